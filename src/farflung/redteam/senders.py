"""Attacks on messages, and on the choice of work. Each docstring says the gain, then the layer that stops it."""

import gzip
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import msgspec

from farflung.engine.base import Request
from farflung.net.client import Client
from farflung.protocol import wire
from farflung.protocol.identity import Key
from farflung.protocol.messages import (
    VERSION,
    Lease,
    LeaseAnswer,
    LeaseRequest,
    Register,
    Status,
    Submission,
    Welcome,
)
from farflung.redteam.adversary import Aim, Attack, Made
from farflung.worker import Worker

Body = Callable[[Submission], bytes]


async def post_raw(worker: Worker, path: str, body: bytes, **headers: str) -> None:
    """POST bytes as they are, signed as they are. Raises the coordinator's refusal."""
    client = worker.session.client
    await client._once("POST", worker.session.path(path), body, True, headers, 1 << 20)


class Raw(Attack):
    """Crashes or fills the coordinator: bytes that are no submission in place of one; sanity."""

    is_at_the_door: ClassVar[bool] = True
    aim: ClassVar[Aim] = "pay"

    def __init__(self, body: Body, **headers: str) -> None:
        self.body, self.headers = body, headers

    async def send(self, worker: Worker, lease: Lease, submission: Submission) -> None:
        path = f"leases/{lease.lease}/submission"
        await post_raw(worker, path, self.body(submission), **self.headers)


def with_reward(submission: Submission) -> bytes:
    """The submission with a field that would set its own reward."""
    return msgspec.msgpack.encode({**msgspec.to_builtins(submission, builtin_types=(bytes,)), "reward": 1.0})


def with_nan(submission: Submission) -> bytes:
    """The submission with log-probabilities that are no numbers."""
    nan = [wire.pack_floats([float("nan")] * (len(one.ids) // 4)) for one in submission.rollouts]
    return wire.encode(msgspec.structs.replace(submission, logp=nan))


def cut(submission: Submission) -> bytes:
    """The submission without its second half."""
    whole = wire.encode(submission)
    return whole[: len(whole) // 2]


def huge(submission: Submission) -> bytes:
    """Far more bytes than the lease can fill."""
    return wire.encode(submission) + bytes(1 << 26)


def bomb(submission: Submission) -> bytes:
    """A small body that unpacks to 64 MiB."""
    return gzip.compress(bytes(1 << 26))


class OtherLease(Attack):
    """Paid for another node's lease: hands its text in under it; identity."""

    is_at_the_door: ClassVar[bool] = True
    aim: ClassVar[Aim] = "pay"

    async def wants(self, worker: Worker, lease: Lease) -> bool:
        status = await worker.session.client.get(worker.session.path("status"), Status)
        theirs = [n.lease for n in status.nodes if n.lease and n.node != worker.session.client.key.id]
        self.theirs = theirs[0] if theirs else "l000000000000"
        return True

    async def send(self, worker: Worker, lease: Lease, submission: Submission) -> None:
        await post_raw(worker, f"leases/{self.theirs}/submission", wire.encode(submission))


class ForgedEvidence(Attack):
    """Clears its own audits: hands in evidence as if it were a validator; identity."""

    is_at_the_door: ClassVar[bool] = True
    aim: ClassVar[Aim] = "pay"

    async def send(self, worker: Worker, lease: Lease, submission: Submission) -> None:
        await post_raw(worker, "audits/a000000000000/evidence", b"\x80")


class ForgedLogp(Attack):
    """A larger weight in the loss: claims that its tokens were certain; nothing has to, for it is a metric."""

    def alter(self, lease: Lease, submission: Submission) -> Submission:
        sure = [wire.pack_floats([0.0] * (len(one.ids) // 4)) for one in submission.rollouts]
        return msgspec.structs.replace(submission, logp=sure)


class Replayed(Attack):
    """Paid twice for one text: hands its first submission in again under every later lease; replay."""

    aim: ClassVar[Aim] = "pay"

    def __init__(self) -> None:
        self._old: Sequence[Any] = ()

    def generate(self, requests: Sequence[Request], should_stop: Any) -> Made:
        if len(self._old) < len(requests):
            self._old = self.truth.generate(requests, should_stop)
        return list(self._old[: len(requests)])


class ManyKeys(Attack):
    """Work withheld from others: with every lease come keys that take leases and never submit; scheduling, for all new
    keys together have few slots."""

    aim: ClassVar[Aim] = "pay"
    AT_ONCE: ClassVar[int] = 4

    async def wants(self, worker: Worker, lease: Lease) -> bool:
        for _ in range(self.AT_ONCE):
            client = Client(worker.client.url, Key.make(), worker.client.tag, patience_s=0.0)
            try:
                await client.post("/v1/nodes", Register(version=VERSION), Welcome)
                await client.post(worker.session.path("leases"), LeaseRequest(), LeaseAnswer)
            finally:
                await client.close()
        return True


class EasyPicking(Attack):
    """The same pay for shorter prompts or surer tasks: hands back every other lease; scheduling, by a growing pause."""

    aim: ClassVar[Aim] = "pay"

    def __init__(self) -> None:
        self._seen = 0

    async def wants(self, worker: Worker, lease: Lease) -> bool:
        self._seen += 1
        return self._seen % 2 == 0
