"""Attacks on text: other words than those that the seeds gave.

Each docstring says what the attack would gain, then what stops it.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from farflung.engine.base import Completion, Request
from farflung.redteam.adversary import Aim, Attack, Made, Stop


class Rewritten(Attack):
    """Base of the attacks that change what the seeds gave."""

    def rewrite(self, request: Request, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Other ids that still end as they must."""
        raise NotImplementedError

    def generate(self, requests: Sequence[Request], should_stop: Stop) -> Made:
        found = self.truth.generate(requests, should_stop)
        return [
            None if done is None else _said(self.rewrite(request, done.ids))
            for request, done in zip(requests, found, strict=True)
        ]


def _said(ids: tuple[int, ...]) -> Completion:
    return Completion(ids, (0.0,) * len(ids))


class Edited(Rewritten):
    """Words of its own in the training data: 1 % of the tokens are others; replay, one flip is nearly enough."""

    aim: ClassVar[Aim] = "poison"

    def rewrite(self, request: Request, ids: tuple[int, ...]) -> tuple[int, ...]:
        others = sorted(set(request.prompt_ids) - self.truth.eos_ids)
        body = [t if t in self.truth.eos_ids or random.random() > 0.01 else random.choice(others) for t in ids]
        return tuple(body)


class SureEdit(Attack):
    """Words of its own where no reader would look: it replaces one token that the policy was certain of; replay, for a
    margin that no rounding makes weighs however sure the policy was."""

    aim: ClassVar[Aim] = "poison"

    def generate(self, requests: Sequence[Request], should_stop: Stop) -> Made:
        found = self.truth.generate(requests, should_stop)
        return [done and self._edited(request, done) for request, done in zip(requests, found, strict=True)]

    def _edited(self, request: Request, done: Completion) -> Completion:
        sure = [at for at, logp in enumerate(done.logp) if logp > -0.02 and done.ids[at] not in self.truth.eos_ids]
        if not sure or random.random() > 0.2:
            return done
        at, others = random.choice(sure), sorted(set(request.prompt_ids) - self.truth.eos_ids)
        other = random.choice([token for token in others if token != done.ids[at]])
        return _said((*done.ids[:at], other, *done.ids[at + 1 :]))


class CutShort(Rewritten):
    """Paid for less work: stops half-way and says the end token; replay."""

    aim: ClassVar[Aim] = "pay"

    def rewrite(self, request: Request, ids: tuple[int, ...]) -> tuple[int, ...]:
        return (*ids[: len(ids) // 2], min(self.truth.eos_ids))


class Verbose(Rewritten):
    """More tokens for a right answer: says the working again and again before it; replay, never the reward."""

    aim: ClassVar[Aim] = "length"

    def rewrite(self, request: Request, ids: tuple[int, ...]) -> tuple[int, ...]:
        half = len(ids) // 2
        again = ids[:half] * (request.max_new_tokens // max(half, 1))
        return (*again[: request.max_new_tokens - len(ids)], *ids)


class OtherPrompt(Attack):
    """Answers an easier question than the one that was leased, always the same; replay."""

    def generate(self, requests: Sequence[Request], should_stop: Stop) -> Made:
        self._easy = getattr(self, "_easy", requests[0].prompt_ids)
        return self.truth.generate([replace(r, prompt_ids=self._easy) for r in requests], should_stop)


class Copied(Attack):
    """One answer for all: generates one sample of each question and hands it in for every one; replay."""

    aim: ClassVar[Aim] = "pay"

    def generate(self, requests: Sequence[Request], should_stop: Stop) -> Made:
        first = {request.prompt_ids: request for request in reversed(requests)}
        said = dict(zip(first, self.truth.generate(list(first.values()), should_stop), strict=True))
        return [said[request.prompt_ids] for request in requests]
