"""Attacks that compute nothing. Each docstring says what the attack would gain, then what stops it."""

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from typing import ClassVar

from farflung.engine.base import Completion, Request
from farflung.net.client import Client
from farflung.protocol.errors import FarflungError
from farflung.protocol.identity import Key
from farflung.protocol.messages import (
    VERSION,
    Heartbeat,
    HeartbeatReply,
    Lease,
    LeaseAnswer,
    LeaseRequest,
    Register,
    Submission,
    Welcome,
)
from farflung.redteam.adversary import Aim, Made, Stop
from farflung.redteam.noises import Patient
from farflung.rollouts.submit import requests_of, submit
from farflung.worker import Worker

log = logging.getLogger(__name__)
POLL_S = 0.2
MARGIN_S = 2.0
"""Seconds before its deadline that a lease is handed in at the latest."""


class StalePartial(Patient):
    """Paid without work: holds a lease until its groups can be leased no more, sends all but a sample of each, made
    up; replay of one rollout of all that no step takes."""

    aim: ClassVar[Aim] = "pay"

    async def wants(self, worker: Worker, lease: Lease) -> bool:
        counts = [len(group.samples) for group in lease.groups]
        self._left_out = {sum(counts[:number]) - 1 for number in range(1, len(counts) + 1)}
        return await super().wants(worker, lease)

    def generate(self, requests: Sequence[Request], should_stop: Stop) -> Made:
        if not self.is_trusted:
            return self.truth.generate(requests, should_stop)
        return [None if i in self._left_out else self._made_up(request) for i, request in enumerate(requests)]

    def _made_up(self, request: Request) -> Completion:
        words = [token for token in request.prompt_ids if token not in self.truth.eos_ids] or [0]
        ids = tuple(random.choices(words, k=request.max_new_tokens))
        return Completion(ids, (0.0,) * len(ids))

    async def send(self, worker: Worker, lease: Lease, submission: Submission) -> None:
        while submission.partial and self._is_early(worker, lease):
            await asyncio.sleep(POLL_S)
        await submit(worker.session, lease, submission)

    def _is_early(self, worker: Worker, lease: Lease) -> bool:
        session = worker.session
        is_over = worker.is_stopping or session.is_over or time.time() > lease.expires_at - MARGIN_S
        return not is_over and session.latest.step < lease.step + session.info.max_staleness


class Colluding(StalePartial):
    """Paid without work or waiting: sends all but a sample of each group, made up, while fresh keys take what is left
    over and sit on it; replay of one rollout of all that no step takes."""

    def __init__(self) -> None:
        self._accomplices = set[asyncio.Task[None]]()

    def _is_early(self, worker: Worker, lease: Lease) -> bool:
        return False

    async def send(self, worker: Worker, lease: Lease, submission: Submission) -> None:
        await super().send(worker, lease, submission)
        if submission.partial:
            left = len(requests_of(lease)) - len(submission.rollouts)
            task = asyncio.create_task(self._sit(worker, left))
            self._accomplices.add(task)
            task.add_done_callback(self._accomplices.discard)

    async def _sit(self, worker: Worker, samples: int) -> None:
        """Take what is left over under a key of its own, and look alive until the run is over."""
        session = worker.session
        client = Client(worker.client.url, Key.make(), worker.client.tag, patience_s=0.0)
        try:
            await client.post("/v1/nodes", Register(version=VERSION), Welcome)
            await client.post(session.path("leases"), LeaseRequest(slots=samples), LeaseAnswer)
            while not (worker.is_stopping or session.is_over):
                await client.post(session.path("heartbeat"), Heartbeat(), HeartbeatReply)
                await asyncio.sleep(session.info.heartbeat_s)
        except FarflungError as error:
            log.info("accomplice left because=%s", error)
        finally:
            await client.close()
