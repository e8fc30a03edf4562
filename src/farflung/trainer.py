"""Trainer: claims a step's batch, takes the step, publishes weights, commits.

Its state after a crash is the latest checkpoint; the steps committed since are replayed from their recorded batches
and must come to the recorded weights, bit for bit.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import torch

from farflung.config import Config
from farflung.engine.loading import in_bfloat16, read_slices
from farflung.learner import checkpoint, disk_full
from farflung.learner.build import learner_of
from farflung.learner.optimise import StepMetrics
from farflung.learner.pack import Rollout
from farflung.learner.ranks import Ranks
from farflung.learner.warning import WINDOW, Sign, warn
from farflung.net.client import Client
from farflung.net.session import Session
from farflung.numerics.devices import pick
from farflung.protocol import probe
from farflung.protocol.errors import BadSignature, Conflict, StepTaken, WeightsError
from farflung.protocol.identity import Key
from farflung.protocol.messages import Batch, BatchAnswer, Commit, Done
from farflung.rollouts import stale
from farflung.rollouts.agreement import refuse_long
from farflung.rollouts.batch import Bodies, claim, fetch
from farflung.rollouts.checker import Checker
from farflung.rollouts.sharded_engine import maker
from farflung.store.sinks import Sinks
from farflung.tasks.longest import longest_text
from farflung.weights.cache import Versions
from farflung.weights.loaded import Loaded
from farflung.weights.manifest import manifest_digest
from farflung.weights.nearness import share_differing
from farflung.weights.patch import patch
from farflung.weights.publish import Adapted, Publisher, weights_digest
from farflung.weights.tensors import empty_engine

log = logging.getLogger(__name__)
WAIT_S = 5.0
NEAR_SHARE = 0.01
"""Of the weights that may differ after a replay: a step moves more of them."""


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
        self.checker: Checker
        self._loaded: Loaded
        self._bodies: Bodies
        self.distributed = learner_of(config, ranks or Ranks())
        self._waited_s = self._checked_s = 0.0
        self._signs: list[Sign] = []
        self._off_share = 0.0
        """Share of the weights in memory that differ from the last version published."""
        self._sinks = Sinks(config)
        learn = config.learn
        in_parts = not learn.is_adapters_alone
        self._publisher = Publisher(self.client, key, config.run.name, learn.anchor_every, in_parts=in_parts)

    async def run(self) -> None:
        """Train until the last step is committed or the trainer is told to stop."""
        self.session = await Session.open(
            self.client, "trainer", run=self.config.run.name, root=self._root, name="trainer", engine="hf"
        )
        self._bodies = Bodies(self.session)
        async with self.session.running("trainer", self.stop, metrics_port=self.config.learn.metrics_port):
            try:
                self._starts("loading the model")
                await asyncio.to_thread(self.load)
                self._starts("loading what replays the batches")
                await self._arm()
                self._starts("trying the model")
                await self._agree()
                while not self.is_stopping and self.done_step < self.config.run.steps:
                    await self.step()
                self.distributed.end()
            finally:
                self._sinks.finish()

    def _starts(self, with_what: str) -> None:
        self.session.stats.phase = f"starting up: {with_what}"

    def stop(self) -> None:
        """Stop after the work in hand."""
        self.is_stopping = True
        self.session.shorten_patience()
        if self._asking is not None:
            self._asking.cancel()

    async def _arm(self) -> None:
        """Open the check of batches: a second engine, and the published versions."""
        learn = self.config.learn
        ranks, make = self.distributed.ranks, maker(self.distributed)
        device = pick(learn.device, ranks.local_rank)
        self.session.stats.accelerators = ranks.world if device.type != "cpu" else 0
        engine = await empty_engine(self.session, threads=learn.threads, device=device, make=make)
        folder = self.config.folder / "nodes" / "trainer" / "weights"
        self._loaded = Loaded(engine, Versions(self.session, folder, use_relays=False, patch=patch))
        self.checker = Checker(self.session, self.config, self._loaded, self._bodies, self._retry_when_disk_full)

    async def _agree(self) -> None:
        """Refuse a model that does not say the same on every node. Raises ConfigError."""
        found = await asyncio.to_thread(self.checker.agree, self.distributed.tensors)
        log.info("model agrees %s", found)
        if found.ways.most_tokens is not None:
            refuse_long(found, await longest_text(self.config))

    def load(self) -> None:
        """The base model, or the latest checkpoint."""
        self.distributed.begin()
        self.done_step = self._resume(self.config.run.steps)

    def _resume(self, most: int) -> int:
        """Load the latest checkpoint up to a step; gives its own, -1 if there is none and nothing was loaded."""
        found = checkpoint.newest(self.checkpoints, most)
        if found is None:
            return -1
        log.info("resumed step=%d from=%s", found.step, found.path)
        return self.distributed.resume(found.path)

    async def _restore(self, step: int) -> None:
        """Bring weights and optimizer back to where they were after an earlier step, by its checkpoint or by replay."""
        self.session.stats.phase = f"restoring step {step}"
        log.warning("restoring step=%d", step)
        done = await asyncio.to_thread(self._resume, step)
        if done < 0:
            await asyncio.to_thread(self.distributed.begin)
        for number in range(done + 1, step + 1):
            batch = (await claim(self.session, number, WAIT_S)).batch
            assert batch is not None, "a committed step keeps its batch"
            await self._learn(batch)
            await self._check_replay(batch)

    async def step(self) -> None:
        """Claim the next step; train, publish and commit it, or replay it if it was committed before."""
        step = self.done_step + 1
        self.session.stats.phase, before = "waiting", time.monotonic()
        answer = await self._next(step)
        self._waited_s += time.monotonic() - before
        if answer is None:
            return
        if answer.batch is None:
            log.debug("step=%d waits because=%s", step, answer.reason)
            self.distributed.wait()
            return
        batch = await self._checked(answer.batch)
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
        self.session.stats.loaded_step = step

    async def _next(self, step: int) -> BatchAnswer | None:
        """The answer to a claim, which may take a while; None if the trainer is told to stop before it is there."""
        self._asking = asyncio.ensure_future(claim(self.session, step, WAIT_S))
        try:
            return await self._asking
        except asyncio.CancelledError:
            if not self.is_stopping:
                raise
            return None
        finally:
            self._asking = None

    async def _checked(self, batch: Batch) -> Batch:
        """The batch that is left once nothing trips any more."""
        before, self._checked_s = time.monotonic(), 0.0
        if not self.config.learn.tripwire or batch.committed:
            return batch
        self.session.stats.phase = f"checking step {batch.step}"
        while await self.checker.trip(batch):
            again = (await claim(self.session, batch.step, WAIT_S)).batch
            assert again is not None, "an open step keeps its batch"
            batch = again
        self._checked_s = time.monotonic() - before
        return batch

    async def _take(self, batch: Batch) -> None:
        self.session.stats.phase = f"training step {batch.step}"
        before = time.monotonic()
        held = await self._held(batch)
        if batch.step and not batch.committed and batch.restores < 0 and not self._publisher.has_base:
            await self._rebase()
        trained = await self._learn(batch)
        train_s = time.monotonic() - before
        if batch.committed:
            await self._check_replay(batch)
        else:
            await self._publish(batch, trained, train_s, held)
        if batch.step % self.config.learn.checkpoint_every == 0:
            await self._retry_when_disk_full(
                "a checkpoint", lambda: asyncio.to_thread(self.distributed.save, batch.step)
            )

    async def _rebase(self) -> None:
        """Publish differences to the last version, unless its key is revoked or it is not to the bit what is held."""
        if self._off_share:
            return self._publisher.forget()
        self._publisher.trusted = self.session.run_keys.keys("weights", time.time())
        try:
            await self._publisher.rebase(self.distributed.tensors(), self.session.latest.manifest)
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
        logp = await self.checker.behaviour(batch, rollouts)
        return await asyncio.to_thread(self._train, rollouts, logp, batch.step - 1)

    def _train(self, rollouts: list[Rollout], logp: stale.Logp, present: int) -> StepMetrics:
        with self.session.stats.working():
            return self.distributed.train(rollouts, logp, present)

    async def _retry_when_disk_full(self, what: str, write: Callable[[], Awaitable[Any]]) -> None:
        """Write something, once there is room for it."""

        def say(error: str) -> None:
            self.session.stats.last_error = error

        await disk_full.retry_when_disk_full(what, write, say, lambda: self.is_stopping)

    def _hold_own(self, digest: str) -> None:
        """Have the weights as they are now in the second engine: the next batch is of these, if none may be stale."""
        self._loaded.ensure(digest, lambda: self._publisher.published.items() or self.distributed.tensors())

    async def _check_replay(self, batch: Batch) -> None:
        """A step that was done again must come to what was published, or near it. Raises WeightsError."""
        digest = await asyncio.to_thread(weights_digest, self.distributed.tensors(), in_parts=self._publisher.in_parts)
        if digest == batch.committed:
            log.info("replayed step=%d digest=%s", batch.step, digest[:12])
        elif batch.step < self.session.latest.step:
            log.warning("replayed step=%d comes to other bits; where the last of them ends counts", batch.step)
        else:
            await self._take_for(batch, digest)

    async def _take_for(self, batch: Batch, digest: str) -> None:
        """Go on from weights that are near what was published; the next step is an anchor. Raises WeightsError."""
        published = await self._published()
        share = await asyncio.to_thread(share_differing, published, self.distributed.tensors())
        if share > NEAR_SHARE:
            raise WeightsError(
                f"replayed step {batch.step} comes to {digest[:12]}, it was committed with {batch.committed[:12]}, and "
                f"{share:.1%} of the weights differ ({NEAR_SHARE:.0%} may); "
                "resume on the hardware, torch and thread count that the run was trained with"
            )
        self._off_share = share
        log.warning("replayed step=%d with weights that differ=%.3f%%; the next is an anchor", batch.step, 100 * share)

    async def _published(self) -> dict[str, torch.Tensor]:
        """The latest version as nodes have it."""
        digest = self.session.latest.manifest
        await self._retry_when_disk_full("weights", lambda: self._loaded.fetch(digest))
        return await asyncio.to_thread(lambda: dict(self._loaded.stored(digest)))

    async def _publish(self, batch: Batch, trained: StepMetrics | None, train_s: float, held: bytes) -> None:
        self.session.stats.phase = f"publishing step {batch.step}"
        before = time.monotonic()
        adapted = await asyncio.to_thread(self._adapted)
        signed = await self._publisher.publish(
            self.distributed.tensors(),
            step=batch.step,
            parent=self.session.latest.manifest,
            commitment=batch.secret_commitment,
            now=time.time(),
            adapted=adapted,
        )
        answers = await asyncio.to_thread(self._answer, batch, manifest_digest(signed)) if batch.canaries else ([], [])
        metrics = self._metrics(batch, trained) | {"train_s": train_s, "publish_s": time.monotonic() - before}
        commit = Commit(
            manifest=signed,
            metrics=metrics,
            checkpoint=f"step-{batch.step:06d}",
            probe=self._show(batch),
            probe_before=held if batch.step else b"",
            canaries=answers[0],
            canary_logp=answers[1],
            restores=batch.restores,
        )
        await self.client.post(self.session.path(f"steps/{batch.step}/commit"), commit, Done)
        if self.config.learn.tripwire and not self.config.learn.max_staleness:
            await asyncio.to_thread(self._hold_own, manifest_digest(signed))
        self._sinks.log(batch.step, metrics)
        self._waited_s = self._off_share = 0.0
        fields = batch.step, batch.seen_reward, len(batch.groups), batch.seen_groups, manifest_digest(signed)[:12]
        log.info("committed step=%d reward=%.3f groups=%d/%d manifest=%s", *fields)

    def _adapted(self) -> Adapted | None:
        """What the weights are made of, where that travels instead of them."""
        is_alone = self.config.learn.is_adapters_alone
        return Adapted(self.distributed.base, self.distributed.factors()) if is_alone else None

    def _answer(self, batch: Batch, digest: str) -> tuple[list[bytes], list[bytes]]:
        """The present weights' completions of the batch's canaries; the tripwire finds those weights loaded."""
        self._hold_own(digest)
        return self.checker.answer(batch)

    async def _held(self, batch: Batch) -> bytes:
        """The slices that the batch's probe chooses, of what nodes have until this step is published."""
        if not self._off_share:
            return self._show(batch)
        slices = probe.slices(self.distributed.learner.policy.shapes(), bytes.fromhex(batch.probe))
        return read_slices(await self._published(), slices)

    def _show(self, batch: Batch) -> bytes:
        """The slices that the batch's probe chooses, of the weights as they are now."""
        slices = probe.slices(self.distributed.learner.policy.shapes(), bytes.fromhex(batch.probe))
        return in_bfloat16(self.distributed.parts(slices))

    def _metrics(self, batch: Batch, trained: StepMetrics | None) -> dict[str, float]:
        figures = {"wait_s": self._waited_s, "tripwire_s": self._checked_s, "replay_off": self._off_share}
        if batch.seen_groups:
            share = len(batch.groups) / batch.seen_groups
            figures |= {"reward": batch.seen_reward, "informative_share": share}
        if trained is None:  # the base model, a step again, or one whose groups were each alike
            return figures
        self._signs = [*self._signs, Sign(trained.entropy, trained.clip_fraction)][-2 * WINDOW :]
        if warning := warn(self._signs):
            log.warning("step=%d %s", batch.step, warning)
        late = [batch.step - 1 - group.step for group in batch.groups]
        figures |= {name: float(getattr(trained, name)) for name in trained.__dataclass_fields__}
        return figures | {"staleness": sum(late) / max(1, len(late)), "collapse_warning": float(bool(warning))}
