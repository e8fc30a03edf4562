"""Trainer: claims a step's batch, takes the step, publishes weights, commits.

Its state after a crash is the latest checkpoint; the steps committed since are replayed from their recorded batches
and must come to the recorded weights, bit for bit.
"""

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import torch

from farflung.config import Config
from farflung.engine.base import Request
from farflung.engine.loading import in_bfloat16
from farflung.engine.local import LocalEngine
from farflung.learner import checkpoint, room
from farflung.learner.build import crew_of
from farflung.learner.optimise import StepMetrics
from farflung.learner.pack import Rollout
from farflung.learner.ranks import Ranks
from farflung.learner.warning import WINDOW, Sign, warn
from farflung.protocol import probe, wire
from farflung.protocol.client import Client
from farflung.protocol.errors import BadSignature, Conflict, StepTaken, WeightsError
from farflung.protocol.identity import Key
from farflung.protocol.messages import Batch, BatchAnswer, Commit, Done, RolloutLook
from farflung.protocol.session import Session
from farflung.rollouts import stale
from farflung.rollouts.agreement import Agreement, agree, refuse_long
from farflung.rollouts.batch import Bodies, Suspect, claim, fetch, suspects, trip
from farflung.rollouts.tripwire import Looked, look, tripped
from farflung.store.sinks import Sinks
from farflung.tasks.longest import longest_text
from farflung.trust.evidence import Profiles
from farflung.trust.profiles import load_profile
from farflung.weights.cache import Versions
from farflung.weights.fetch import fetch_model_config, fetch_stops
from farflung.weights.loaded import Loaded
from farflung.weights.manifest import manifest_digest
from farflung.weights.patch import patch
from farflung.weights.publish import Adapted, Publisher, weights_digest

log = logging.getLogger(__name__)
WAIT_S = 5.0


class Trainer:
    """The run's one trainer."""

    def __init__(
        self, url: str, key: Key, config: Config, *, root: bytes | None = None, ranks: Ranks | None = None
    ) -> None:
        self.client, self.key, self.config, self._root = Client(url, key), key, config, root
        self.checkpoints = config.folder / "checkpoints"
        self.is_stopping = False
        self._asking: asyncio.Future[BatchAnswer] | None = None
        self.done_step = -1
        """The step whose weights are in memory; -1 before the base model counts as step 0."""
        self.session: Session
        self._bodies: Bodies
        self.crew = crew_of(config, ranks or Ranks())
        self._waited_s = self._checked_s = 0.0
        self._seen: dict[str, torch.Tensor] = {}
        """By rollout, what the tripwire found its tokens to be worth."""
        self._signs: list[Sign] = []
        self._sinks = Sinks(config)
        self._publisher = Publisher(self.client, key, config.run.name, config.learn.anchor_every)

    async def run(self) -> None:
        """Train until the last step is committed or somebody says stop."""
        self.session = await Session.open(
            self.client, "trainer", run=self.config.run.name, root=self._root, name="trainer", engine="hf"
        )
        self._bodies = Bodies(self.session)
        async with self.session.stay("trainer", self.stop, metrics_port=self.config.learn.metrics_port):
            try:
                self._starts("loading the model")
                await asyncio.to_thread(self.load)
                self._starts("loading what replays the batches")
                await self._arm()
                self._starts("trying the model")
                await self._agree()
                while not self.is_stopping and self.done_step < self.config.run.steps:
                    await self.step()
                self.crew.end()
            finally:
                self._sinks.finish()

    def _starts(self, with_what: str) -> None:
        self.session.figures.phase = f"starting up: {with_what}"

    def stop(self) -> None:
        """Stop after the work in hand."""
        self.is_stopping = True
        self.session.hurry()
        if self._asking is not None:
            self._asking.cancel()

    async def _arm(self) -> None:
        """What the tripwire needs: a second engine, and the published versions."""
        self.engine = LocalEngine.from_folder(
            await fetch_model_config(self.session),
            dtype=getattr(torch, self.session.info.dtype),
            threads=self.config.learn.threads,
            eos_ids=self.session.info.eos_ids,
            stops=await fetch_stops(self.session),
        )
        folder = self.config.folder / "nodes" / "trainer" / "weights"
        self.weights = Versions(self.session, folder, use_relays=False, patch=patch)
        run, *others = map(load_profile, (self.config.model.profile, *self.config.model.profiles))
        self._profiles = Profiles(run, tuple(others))
        self.loaded = Loaded(self.engine, self.weights)

    async def _agree(self) -> None:
        """Refuse a model that does not say the same to all who compute with it. Raises ConfigError."""
        found = await asyncio.to_thread(self._try)
        log.info("model agrees %s", found)
        if found.ways.most_tokens is not None:
            refuse_long(found, await longest_text(self.config))

    def _try(self) -> Agreement:
        with self.session.figures.working():
            self.engine.load(self.crew.tensors())
            return agree(self.engine)

    def load(self) -> None:
        """The base model, or the latest checkpoint."""
        self.crew.begin()
        self.done_step = self._resume(self.config.run.steps)

    def _resume(self, most: int) -> int:
        """Load the latest checkpoint up to a step; gives its own, -1 if there is none and nothing was loaded."""
        found = checkpoint.newest(self.checkpoints, most)
        if found is None:
            return -1
        log.info("resumed step=%d from=%s", found.step, found.path)
        return self.crew.resume(found.path)

    async def _restore(self, step: int) -> None:
        """Bring weights and optimizer back to where they were after an earlier step, by its checkpoint or by replay."""
        self.session.figures.phase = f"restoring step {step}"
        log.warning("restoring step=%d", step)
        done = await asyncio.to_thread(self._resume, step)
        if done < 0:
            await asyncio.to_thread(self.crew.begin)
        for number in range(done + 1, step + 1):
            batch = (await claim(self.session, number, WAIT_S)).batch
            assert batch is not None, "a committed step keeps its batch"
            await self._learn(batch)
            await self._check_replay(batch)

    async def step(self) -> None:
        """Claim the next step; train, publish and commit it, or replay it if it was committed before."""
        step = self.done_step + 1
        self.session.figures.phase = "waiting"
        before = time.monotonic()
        answer = await self._next(step)
        self._waited_s += time.monotonic() - before
        if answer is None:
            return
        if answer.batch is None:
            log.debug("step=%d waits because=%s", step, answer.reason)
            self.crew.wait()
            return
        batch = answer.batch
        before, self._checked_s, self._seen = time.monotonic(), 0.0, {}
        if self.config.learn.tripwire and not batch.committed:
            while await self._trip(batch):
                again = (await claim(self.session, step, WAIT_S)).batch
                assert again is not None, "an open step keeps its batch"
                batch = again
            self._checked_s = time.monotonic() - before
        try:
            await self._take(batch)
        except Conflict as error:
            again = (await claim(self.session, step, WAIT_S)).batch
            if again is None or again.restores < 0 or isinstance(error, StepTaken):
                raise
            log.warning("step=%d begins again because=%s", step, error)  # rolled back while it was in training
            self._publisher.forget()
            return
        self.done_step = step
        self.session.figures.loaded_step = step

    async def _next(self, step: int) -> BatchAnswer | None:
        """The answer to a claim, which may take a while; None if somebody says stop before it is there."""
        self._asking = asyncio.ensure_future(claim(self.session, step, WAIT_S))
        try:
            return await self._asking
        except asyncio.CancelledError:
            if not self.is_stopping:
                raise
            return None
        finally:
            self._asking = None

    async def _trip(self, batch: Batch) -> int:
        """Replay a batch, and have what is not what its seeds give taken out; gives 0 if the batch stays as it is.

        Several updates need to know what every rollout was worth before the first, so then none is left out.
        """
        self.session.figures.phase = f"checking step {batch.step}"
        every = await suspects(self._bodies, batch, is_all=self.config.learn.minibatches > 1)
        found: list[Looked] = []
        for digest in sorted({one.manifest for one in every}):
            await self._fetch(digest)
            part = [one for one in every if one.manifest == digest]
            found += await asyncio.to_thread(self._look, digest, part, batch.temperature)
        self._seen = {one.rollout: one.logp for one in found}
        looked = [RolloutLook(rollout=one.rollout, **one.flips._asdict()) for one in found]
        if caught := tripped((one.submission, one.log_ratios) for one in found if not one.is_audited):
            log.warning("tripwire step=%d submissions=%d", batch.step, len(caught))
        return len(caught) + await trip(self.session, batch.step, caught, looked)

    def _look(self, digest: str, part: list[Suspect], temperature: float) -> list[Looked]:
        with self.session.figures.working():
            self.loaded.ensure(digest)
            return look(self.engine, part, temperature, self.config.generate.budget, self._profiles)

    async def _take(self, batch: Batch) -> None:
        self.session.figures.phase = f"training step {batch.step}"
        before = time.monotonic()
        held = self._show(batch)
        if batch.step and not batch.committed and batch.restores < 0 and not self._publisher.has_base:
            await self._rebase()
        trained = await self._learn(batch)
        train_s = time.monotonic() - before
        if batch.committed:
            await self._check_replay(batch)
        else:
            await self._publish(batch, trained, train_s, held)
        if batch.step % self.config.learn.checkpoint_every == 0:
            await self._with_room("a checkpoint", lambda: asyncio.to_thread(self.crew.save, batch.step))

    async def _rebase(self) -> None:
        """Publish differences to the last version, unless its key is revoked: then the next one is an anchor."""
        self._publisher.trusted = self.session.papers.keys("weights", time.time())
        try:
            await self._publisher.rebase(self.crew.tensors(), self.session.latest.manifest)
        except BadSignature as error:
            log.warning("the next step is an anchor because=%s", error)
            self._publisher.forget()

    async def _learn(self, batch: Batch) -> StepMetrics | None:
        """One update, or the state of an earlier step again."""
        if batch.restores >= 0:
            await self._restore(batch.restores)
            return None
        rollouts = await fetch(self._bodies, batch, divide_by_std=self.config.learn.divide_by_std)
        if not rollouts:
            return None
        logp = await self._behaviour(batch, rollouts)
        return await asyncio.to_thread(self._train, rollouts, logp, batch.step - 1)

    def _train(self, rollouts: list[Rollout], logp: stale.Logp, present: int) -> StepMetrics:
        with self.session.figures.working():
            return self.crew.train(rollouts, logp, present)

    async def _behaviour(self, batch: Batch, rollouts: list[Rollout]) -> stale.Logp:
        """What rollouts were worth to the weights they were leased at; of a committed step, as it was then.

        Stale ones must be known, fresh ones serve several updates. The tripwire has found out already; but where it
        leaves out what was audited, chance decides what is replayed together, and so would it decide the last bits.
        """
        learn, folder = self.config.learn, self.checkpoints / "behaviour"
        by_step = stale.stale(rollouts, batch.step - 1)
        if learn.minibatches == 1 and not (by_step and learn.importance_cap):
            return {}
        if batch.committed:
            return stale.kept(folder, batch.step)
        names = [rollout.rollout for group in batch.groups for rollout in group.rollouts]
        seen = self._seen if learn.minibatches > 1 else {}
        logp = {index: seen[name] for index, name in enumerate(names) if name in seen}
        if not learn.importance_cap:  # stale tokens count as they are
            logp, by_step = {i: values for i, values in logp.items() if rollouts[i].step not in by_step}, {}
        for step, digest in {group.step: group.manifest for group in batch.groups if group.step in by_step}.items():
            if missing := [index for index in by_step[step] if index not in logp]:
                await self._fetch(digest)
                logp |= await asyncio.to_thread(self._judge, digest, rollouts, missing)
        keep = partial(asyncio.to_thread, stale.keep, logp, folder, batch.step)
        await self._with_room("what rollouts were worth before", keep)
        return logp

    def _judge(self, digest: str, rollouts: list[Rollout], which: list[int]) -> stale.Logp:
        with self.session.figures.working():
            self.loaded.ensure(digest)
            return stale.behaviour(self.engine.model, rollouts, which, self.config.learn.microbatch_tokens)

    async def _fetch(self, digest: str) -> None:
        """Have these weights on disk, unless the second engine holds them."""
        if not self.loaded.has(digest):
            await self._with_room("weights", lambda: self.weights.fetch(digest))

    async def _with_room(self, what: str, write: Callable[[], Awaitable[Any]]) -> None:
        """Write something, once there is room for it."""

        def say(trouble: str) -> None:
            self.session.figures.trouble = trouble

        await room.patiently(what, write, say, lambda: self.is_stopping)

    def _hold_own(self, digest: str) -> None:
        """Have the weights as they are now in the second engine: the next batch is of these, if none may be stale."""
        self.loaded.ensure(digest, lambda: self._publisher.published.items() or self.crew.tensors())

    async def _check_replay(self, batch: Batch) -> None:
        digest = await asyncio.to_thread(weights_digest, self.crew.tensors())
        if digest != batch.committed:
            raise WeightsError(
                f"replayed step {batch.step} comes to {digest[:12]}, it was committed with {batch.committed[:12]}; "
                "resume on the hardware, torch and thread count that the run was trained with"
            )
        log.info("replayed step=%d digest=%s", batch.step, digest[:12])

    async def _publish(self, batch: Batch, trained: StepMetrics | None, train_s: float, held: bytes) -> None:
        self.session.figures.phase = f"publishing step {batch.step}"
        before = time.monotonic()
        policy = self.crew.learner.policy
        signed = await self._publisher.publish(
            self.crew.tensors(),
            step=batch.step,
            parent=self.session.latest.manifest,
            commitment=batch.secret_commitment,
            now=time.time(),
            adapted=Adapted(policy.base, policy.factors()) if policy.is_lora_alone else None,
        )
        canaries = await asyncio.to_thread(self._answer, batch, manifest_digest(signed)) if batch.canaries else []
        metrics = self._metrics(batch, trained) | {"train_s": train_s, "publish_s": time.monotonic() - before}
        commit = Commit(
            manifest=signed,
            metrics=metrics,
            checkpoint=f"step-{batch.step:06d}",
            probe=self._show(batch),
            probe_before=held if batch.step else b"",
            canaries=canaries,
            restores=batch.restores,
        )
        await self.client.post(self.session.path(f"steps/{batch.step}/commit"), commit, Done)
        if self.config.learn.tripwire and not self.config.learn.max_staleness:
            await asyncio.to_thread(self._hold_own, manifest_digest(signed))
        self._sinks.log(batch.step, metrics)
        self._waited_s = 0.0
        log.info(
            "committed step=%d reward=%.3f groups=%d/%d manifest=%s",
            batch.step,
            batch.seen_reward,
            len(batch.groups),
            batch.seen_groups,
            manifest_digest(signed)[:12],
        )

    def _answer(self, batch: Batch, digest: str) -> list[bytes]:
        """What the weights as they are now say to the batch's canaries; the tripwire finds them loaded."""
        self._hold_own(digest)
        asked = [
            Request(tuple(wire.unpack_ids(one.prompt_ids).tolist()), one.seed, batch.temperature, one.budget)
            for one in batch.canaries
        ]
        return [wire.pack_ids(done.ids) for done in self.engine.generate(asked) if done is not None]

    def _show(self, batch: Batch) -> bytes:
        """The slices that the batch's probe chooses, of the weights as they are now."""
        policy = self.crew.learner.policy
        slices = probe.slices(policy.shapes(), bytes.fromhex(batch.probe))
        masters = dict(self.crew.masters(sorted({part.name for part in slices})))
        return in_bfloat16(policy.rounded(masters[name].flatten()[start:stop], start) for name, start, stop in slices)

    def _metrics(self, batch: Batch, trained: StepMetrics | None) -> dict[str, float]:
        figures = {"wait_s": self._waited_s, "tripwire_s": self._checked_s}
        if batch.seen_groups:
            share = len(batch.groups) / batch.seen_groups
            figures |= {"reward": batch.seen_reward, "informative_share": share}
        if trained is None:  # the base model, a step again, or one whose groups were each alike
            return figures
        self._signs = [*self._signs, Sign(trained.entropy, trained.clip_fraction)][-2 * WINDOW :]
        if warning := warn(self._signs):
            log.warning("step=%d %s", batch.step, warning)
        staleness = [batch.step - 1 - group.step for group in batch.groups]
        figures |= {name: float(getattr(trained, name)) for name in trained.__dataclass_fields__}
        return figures | {
            "staleness": sum(staleness) / max(1, len(staleness)),
            "collapse_warning": float(bool(warning)),
        }


def follow(config: Config, ranks: Ranks) -> None:
    """Train beside rank 0, which alone knows the coordinator, until it says that all is done."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 is told too; it finishes its step, and needs us for that
    crew_of(config, ranks).follow()
