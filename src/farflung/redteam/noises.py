"""Attacks that sample with other noise than the lease asks for, always or now and then.

Each docstring says what the attack would gain, then what stops it.
"""

import random
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

from farflung.engine.base import Completion, Request
from farflung.protocol.messages import Lease, Status
from farflung.redteam.adversary import Aim, Attack, Made, Stop
from farflung.worker import Worker


def reseeded(requests: Sequence[Request]) -> list[Request]:
    """The same requests under noise of one's own."""
    return [replace(request, seed=secrets.randbits(64)) for request in requests]


class Unseeded(Attack):
    """Could choose among many answers, for it samples from the right policy with its own noise; replay."""

    def generate(self, requests: Sequence[Request], should_stop: Stop) -> Made:
        return self.truth.generate(reseeded(requests), should_stop)


class BestOf(Attack):
    """Reward or length by choice: n answers under its own noise, of which it sends the best; replay."""

    def __init__(self, n: int, worth: Callable[[Completion], float]) -> None:
        self.n, self.worth = n, worth

    def generate(self, requests: Sequence[Request], should_stop: Stop) -> Made:
        tried = [self.truth.generate(reseeded(requests), should_stop) for _ in range(self.n)]
        whole = ([one for one in several if one is not None] for several in zip(*tried, strict=True))
        return [max(several, key=self.worth, default=None) for several in whole]


def likely(done: Completion) -> float:
    """Mean log-probability, a fair guess at reward."""
    return sum(done.logp) / len(done.logp)


def long(done: Completion) -> float:
    """Number of tokens."""
    return len(done.ids)


def short(done: Completion) -> float:
    """Number of tokens, the fewer the better."""
    return -len(done.ids)


class Reroll(Attack):
    """A group with more variance: rolls every other member again with its own noise; replay."""

    def generate(self, requests: Sequence[Request], should_stop: Stop) -> Made:
        own = [r if i % 2 else replace(r, seed=secrets.randbits(64)) for i, r in enumerate(requests)]
        return self.truth.generate(own, should_stop)


class Temperature(Attack):
    """Surer answers (below 1) or more variance (above) under the leased seeds; replay, in some hundred tokens."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def generate(self, requests: Sequence[Request], should_stop: Stop) -> Made:
        return self.truth.generate([replace(r, temperature=r.temperature * self.factor) for r in requests], should_stop)


# --- now and then ----------------------------------------------------------------------------------------------------


class Sometimes(Unseeded):
    """Cheats on one rollout in ten and is honest in the rest; replay, whose test has that among its alternatives."""

    def generate(self, requests: Sequence[Request], should_stop: Stop) -> Made:
        own = [replace(r, seed=secrets.randbits(64)) if random.random() < 0.1 else r for r in requests]
        return self.truth.generate(own, should_stop)


class Patient(Unseeded):
    """Honest until it is trusted and seldom audited, unseeded from then on; replay at the floor, and the tripwire."""

    aim: ClassVar[Aim] = "poison"
    is_trusted = False

    async def wants(self, worker: Worker, lease: Lease) -> bool:
        if not self.is_trusted:
            status = await worker.session.client.get(worker.session.path("status"), Status)
            own = [node.status for node in status.nodes if node.node == worker.session.client.key.id]
            self.is_trusted = "trusted" in own
        return True

    def generate(self, requests: Sequence[Request], should_stop: Stop) -> Made:
        return (super() if self.is_trusted else self.truth).generate(requests, should_stop)


class PatientTenth(Patient, Sometimes):
    """Honest until it is trusted, then unseeded on one rollout in ten; replay at the floor, and the tripwire."""
