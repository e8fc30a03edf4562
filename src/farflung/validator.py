"""Validator: claims an audit, recomputes, signs evidence. When no audit waits it evaluates on held-out tasks."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from farflung.audits import replay_audits
from farflung.config import ValidatorSection
from farflung.engine.base import Completion, Engine
from farflung.engine.fit import longest, slots_on
from farflung.net.client import Client
from farflung.net.session import Session, hardware
from farflung.numerics.devices import accelerator, pick, say
from farflung.numerics.quantise import quantised
from farflung.protocol.errors import FailedCanary, LeaseGone, Malformed, NotFound, WeightsError, WrongWeights
from farflung.protocol.identity import Key
from farflung.protocol.messages import AuditJob, Evidence, Lease, LeaseAnswer, LeaseRequest
from farflung.protocol.numerics import COARSER
from farflung.rollouts.submit import generate, open_lease, submission_of, submit
from farflung.weights.cache import Versions
from farflung.weights.engines import Engines
from farflung.weights.patch import patch
from farflung.weights.tensors import builder, fetch_model_config, tensors

log = logging.getLogger(__name__)
WAIT_S = 0.5
RECENT = 32
"""Claims over which the cost of an audited token is told."""


class Validator:
    """One validator. It keeps nothing: kill it, and its claims go to another."""

    def __init__(
        self,
        url: str,
        key: Key,
        folder: Path,
        settings: ValidatorSection,
        *,
        run: str = "",
        root: bytes | None = None,
        name: str = "",
    ) -> None:
        self.client = Client(url, key)
        self.key, self.folder, self.settings, self.name = key, folder, settings, name
        self._run, self._root = run, root
        self.is_stopping = False
        self._recent: deque[tuple[float, float, int]] = deque(maxlen=RECENT)
        """CPU-seconds, device-seconds and tokens of the latest claims."""
        self.session: Session
        self.engines: Engines
        self.weights: Versions

    async def run(self) -> None:
        """Work until the run ends or the validator is told to stop."""
        await self.open()
        port = self.settings.metrics_port
        async with self.session.running("validator", self.stop, metrics_port=port, on_heartbeat=self.weights.prefetch):
            try:
                while not self.is_stopping and not self.session.is_over:
                    await self.step()
            finally:
                await self.weights.close()

    async def open(self) -> None:
        """Join and build the empty model, in the arithmetic that evaluates."""
        device = pick(self.settings.device)
        say("validator", device, self.settings.device)
        names = {"run": self._run, "root": self._root, "name": self.name, "machine": hardware(*accelerator(device))}
        self.session = await Session.open(self.client, "validator", engine="torch", device=device.type, **names)
        config, info = await fetch_model_config(self.session), self.session.info
        text, most = longest(info), self.settings.slots
        rows = await asyncio.to_thread(slots_on, device, config, getattr(torch, info.dtype), text, most=most)
        options = {"max_rows": rows, "threads": self.settings.threads, "device": device}
        build = await builder(self.session, config, **options)
        self.weights = Versions(self.session, self.folder / "weights", use_relays=False, patch=patch)
        first, stats = self.session.info.dtype, self.session.stats
        stats.accelerators = int(device.type != "cpu")
        self.engines = Engines(build, config, device, self.weights, first, stats)

    def stop(self) -> None:
        """Stop after the work in hand."""
        self.is_stopping = True
        self.session.shorten_patience()

    async def step(self) -> None:
        """Audits before anything else; then, if none waits, an evaluation."""
        self.session.stats.phase = "waiting"
        jobs = await replay_audits.claim(self.session, self.settings.claim, WAIT_S, self.settings.linger_s)
        if jobs:
            await self._audit(jobs)
        else:
            await self._evaluate()

    async def _audit(self, jobs: Sequence[AuditJob]) -> None:
        self.session.stats.phase = "auditing"
        await self.weights.fetch(jobs[0].manifest)
        for job in jobs:
            if job.manifest_before:
                await self._fetch_earlier(job.manifest_before)
        for evidence in await self._evidence(jobs):
            try:
                await replay_audits.testify(self.session, self.key, evidence)
            except (WrongWeights, FailedCanary) as error:
                log.error("loading the weights anew because=%s", error)
                self.engines.invalidate()
            except (Malformed, NotFound) as error:  # one odd audit must not stop the others
                log.error("evidence refused audit=%s because=%s", evidence.audit, error)
        log.info("audited step=%d audits=%d", jobs[0].step, len(jobs))

    async def _evidence(self, jobs: Sequence[AuditJob]) -> list[Evidence]:
        """Evidence on audits; their version may be let go of as newer ones come, and is then fetched again."""
        try:
            return await asyncio.to_thread(self._replay, jobs)
        except WeightsError as error:
            log.warning("fetching the weights again because=%s", error)
            self.engines.invalidate()
            await self.weights.fetch(jobs[0].manifest)
            return await asyncio.to_thread(self._replay, jobs)

    def _replay(self, jobs: Sequence[AuditJob]) -> list[Evidence]:
        figures = self.session.stats
        with figures.working() as used:
            found = [one for part in replay_audits.alike(jobs) for one in self._replay_in(part)]
            tokens = sum(len(one.gap) // 4 for evidence in found for one in evidence.rollouts)
            self._recent.append((*used(), tokens))
            cpu_s, device_s, tokens_ = (sum(column) for column in zip(*self._recent, strict=True))
            figures.recent_cpu_s, figures.recent_device_s, figures.recent_tokens = cpu_s, device_s, int(tokens_)
            suspects = {job.audit: job for job in jobs if job.is_suspect}
            return [self._explain(suspects[e.audit], e) if e.audit in suspects else e for e in found]

    def _replay_in(self, jobs: Sequence[AuditJob]) -> list[Evidence]:
        """Evidence on audits that are all to be replayed in one arithmetic, with weights quantised alike."""
        arithmetic, loaded = self.engines.loaded_in(jobs[0].verify_in)
        loaded.ensure(jobs[0].manifest, quantiser=replay_audits.quantiser_of(jobs[0]))
        return replay_audits.replay(loaded.engine, jobs, self.session.run, arithmetic, loaded.possession)

    def _explain(self, job: AuditJob, evidence: Evidence) -> Evidence:
        """Try what else could have made a suspect's rollouts; the engine ends with other weights than the leased."""
        _, loaded = self.engines.loaded_in((evidence.arithmetic,))
        engine = loaded.engine
        own = replay_audits.quantiser_of(job)
        loaded.ensure(job.manifest, quantiser=own)
        loaded.invalidate()
        named = list(tensors(self.weights, job.manifest))
        loads = [
            (f"weights quantised to {kind}", lambda kind=kind: engine.load(quantised(named, kind)))
            for kind in COARSER[own]
        ]
        if job.manifest_before and self.weights.has(job.manifest_before):
            before = self.weights.known(job.manifest_before)
            name = f"the weights of step {before.step}: a weight update was missed"
            before_it = partial(tensors, self.weights, job.manifest_before)
            loads.append((name, lambda: engine.load(quantised(before_it(), own))))
        return replay_audits.explain(engine, evidence, job, loads)

    async def _fetch_earlier(self, digest: str) -> None:
        """The weights of the step before, if they can still be had."""
        try:
            await self.weights.fetch(digest)
        except (NotFound, WeightsError) as error:
            log.warning("one explanation less manifest=%s because=%s", digest[:12], error)

    async def _evaluate(self) -> None:
        """One lease of held-out tasks, greedily."""
        ask = LeaseRequest(loaded_step=self.session.stats.loaded_step, slots=self.settings.slots)
        answer = await self.session.client.post(self.session.path("leases"), ask, LeaseAnswer)
        self.session.latest = answer.latest
        if answer.lease is not None:
            lease = await open_lease(self.session, answer.lease)
            with self.session.holding(lease):
                await self._hand_in(lease)

    def _generate(self, lease: Lease, engine: Engine) -> list[tuple[str, Completion]]:
        figures = self.session.stats
        with figures.working("made"):
            self.session.held[lease.lease].follow(lambda: engine.made)
            done = generate(engine, lease, lambda: False)
        figures.made_tokens += sum(len(completion.ids) for _, completion in done)
        return done

    async def _hand_in(self, lease: Lease) -> None:
        self.session.stats.phase = "evaluating"
        await self.weights.fetch(lease.manifest)
        before = time.monotonic()
        try:
            _, loaded = await asyncio.to_thread(self.engines.loaded_in, (self.session.info.dtype,))
            await asyncio.to_thread(loaded.ensure, lease.manifest)
            done = await asyncio.to_thread(self._generate, lease, loaded.engine)
            assigned = sum(len(group.samples) for group in lease.groups)
            taken_s = time.monotonic() - before
            shown = loaded.possession(lease.nonce, lease.probe)
            submission = submission_of(done, assigned=assigned, generate_s=taken_s, possession=shown)
            await submit(self.session, lease, submission)
        except WrongWeights as error:
            log.error("loading the weights anew because=%s", error)
            self.engines.invalidate()
        except (LeaseGone, WeightsError) as error:
            log.warning("lost lease=%s because=%s", lease.lease, error)
