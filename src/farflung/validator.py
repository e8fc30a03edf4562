"""Validator: claims an audit, recomputes, signs evidence. When no audit waits it evaluates on held-out tasks."""

import asyncio
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from farflung.config import ValidatorSection
from farflung.engine.local import LocalEngine
from farflung.protocol.client import Client
from farflung.protocol.errors import LeaseGone, Malformed, NotFound, WeightsError, WrongWeights
from farflung.protocol.identity import Key, Signed
from farflung.protocol.messages import AuditJob, Evidence, LeaseAnswer, LeaseRequest
from farflung.protocol.session import Session
from farflung.rollouts import verify
from farflung.rollouts.submit import generate, open_lease, show_possession, submission_of, submit
from farflung.weights.cache import Versions
from farflung.weights.fetch import fetch_model_config, tensors
from farflung.weights.patch import patch

log = logging.getLogger(__name__)
WAIT_S = 0.5


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
        self.session: Session
        self.engine: LocalEngine
        self.weights: Versions

    async def run(self) -> None:
        """Work until the run ends or somebody says stop."""
        await self.open()
        async with self.session.stay("validator", self.stop, metrics_port=self.settings.metrics_port):
            while not self.is_stopping and not self.session.is_over:
                await self.step()
        await self.weights.close()

    async def open(self) -> None:
        """Join and build the empty model."""
        self.session = await Session.open(
            self.client, "validator", run=self._run, root=self._root, name=self.name, engine="local"
        )
        self.engine = LocalEngine.from_folder(
            await fetch_model_config(self.session),
            dtype=getattr(torch, self.session.info.dtype),
            threads=self.settings.threads,
            eos_ids=self.session.info.eos_ids,
            max_rows=self.settings.slots,
        )
        self.weights = Versions(self.session, self.folder / "weights", patch=patch)

    def stop(self) -> None:
        """Stop after the work in hand."""
        self.is_stopping = True
        self.session.hurry()

    async def step(self) -> None:
        """Audits before anything else; then, if none waits, an evaluation."""
        self.session.figures.phase = "waiting"
        jobs = await verify.claim(self.session, self.settings.claim, WAIT_S)
        if jobs:
            await self._audit(jobs)
        else:
            await self._evaluate()

    async def _audit(self, jobs: Sequence[AuditJob]) -> None:
        self.session.figures.phase = "auditing"
        await self.weights.fetch(jobs[0].manifest)
        for evidence in await asyncio.to_thread(self._replay, jobs):
            try:
                await verify.testify(self.session, self.key, evidence)
            except WrongWeights as error:
                log.error("loading the weights anew because=%s", error)
                self.session.figures.loaded_step = -1
            except (Malformed, NotFound) as error:  # one odd audit must not stop the others
                log.error("evidence refused audit=%s because=%s", evidence.audit, error)
        log.info("audited step=%d audits=%d", jobs[0].step, len(jobs))

    def _replay(self, jobs: Sequence[AuditJob]) -> list[Evidence]:
        with self.session.figures.working():
            self._load(jobs[0].manifest)
            manifest = self.weights.known(jobs[0].manifest)
            return verify.replay(self.engine, manifest, jobs, self.session.run, self.session.info.profile)

    def _load(self, digest: str) -> None:
        manifest = self.weights.known(digest)
        if self.session.figures.loaded_step != manifest.step:
            self.session.figures.loaded_step = -1  # until it is whole: half of another version would damn the honest
            self.engine.load(tensors(self.weights, digest))
            self.session.figures.loaded_step = manifest.step

    async def _evaluate(self) -> None:
        """One lease of held-out tasks, greedily."""
        ask = LeaseRequest(loaded_step=self.session.figures.loaded_step, slots=self.settings.slots)
        answer = await self.session.client.post(self.session.path("leases"), ask, LeaseAnswer)
        self.session.latest = answer.latest
        if answer.lease is not None:
            await self._hand_in(answer.lease)

    async def _hand_in(self, signed: Signed) -> None:
        lease = open_lease(self.session, signed)
        self.session.figures.phase = "evaluating"
        await self.weights.fetch(lease.manifest)
        before = time.monotonic()
        try:
            await asyncio.to_thread(self._load, lease.manifest)
            done = await asyncio.to_thread(generate, self.engine, lease, lambda: False)
            assigned = sum(len(group.samples) for group in lease.groups)
            taken_s = time.monotonic() - before
            shown = show_possession(self.engine, self.weights.known(lease.manifest), lease.probe, lease.nonce)
            submission = submission_of(done, assigned=assigned, generate_s=taken_s, possession=shown)
            await submit(self.session, lease, submission)
        except WrongWeights as error:
            log.error("loading the weights anew because=%s", error)
            self.session.figures.loaded_step = -1
        except (LeaseGone, WeightsError) as error:
            log.warning("lost lease=%s because=%s", lease.lease, error)
