"""Attacks on text: other noise, other weights, other words than the lease asks for.

Each docstring says what the attack would gain, then what stops it.
"""

import copy
import random
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from farflung.engine.base import Completion, Request
from farflung.engine.noise import gumbel
from farflung.engine.precision import rounded
from farflung.ops.redteam.base import Aim, Attack, Made
from farflung.protocol.messages import Lease, Status
from farflung.trust import evidence
from farflung.trust.evidence import Seen
from farflung.worker import Worker

Stop = Callable[[], bool] | None
Pick = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits (B, V), scores with the leased noise (B, V)) → token (B,)."""


def reseeded(requests: Sequence[Request]) -> list[Request]:
    """The same requests under noise of one's own."""
    return [replace(request, seed=secrets.randbits(64)) for request in requests]


# --- other noise -----------------------------------------------------------------------------------------------------


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


# --- other picks under the leased noise ------------------------------------------------------------------------------


@torch.inference_mode()
def steer(model: Any, requests: Sequence[Request], ends: Callable[[list[int]], bool], pick: Pick) -> list[Completion]:
    """Decode with a pick of one's own, without a cache: slow, and short enough to be read."""
    said: list[list[int]] = [[] for _ in requests]
    live = list(range(len(requests)))
    while live:
        rows = [(*requests[i].prompt_ids, *said[i]) for i in live]
        ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, ids in enumerate(rows):
            ids_BT[row, : len(ids)] = torch.tensor(ids)  # what lies right of a position cannot reach it
        last_B = torch.tensor([len(ids) - 1 for ids in rows])
        logits_BV = model(input_ids=ids_BT, use_cache=False).logits[torch.arange(len(rows)), last_B].float()
        heat_B1 = torch.tensor([max(requests[i].temperature, 1e-6) for i in live])[:, None]
        seeds, places = [requests[i].seed for i in live], [len(said[i]) for i in live]
        scores_BV = logits_BV / heat_B1 + gumbel(seeds, places, logits_BV.shape[1])
        for i, token in zip(live, pick(logits_BV, scores_BV).tolist(), strict=True):
            said[i].append(token)
        live = [i for i in live if not ends(said[i]) and len(said[i]) < requests[i].budget]
    return [Completion(tuple(ids), (0.0,) * len(ids)) for ids in said]


class Steered(Attack):
    """Base of the attacks that pick other tokens under the leased noise."""

    def pick(self, logits_BV: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        """The token of each row."""
        raise NotImplementedError

    def generate(self, requests: Sequence[Request], should_stop: Stop) -> Made:
        return list(steer(self.truth.model, requests, self._ends, self.pick))  # type: ignore[attr-defined]

    def _ends(self, ids: list[int]) -> bool:
        return ids[-1] in self.truth.eos_ids or bool(self.truth.stops and self.truth.stops.end(ids))


class Greedy(Steered):
    """The policy's best answer every time, without exploring; replay."""

    def pick(self, logits_BV: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        return logits_BV.argmax(dim=-1)


class TopK(Steered):
    """Fewer odd tokens, hence surer answers: the leased noise among the k likeliest only; replay."""

    def __init__(self, k: int) -> None:
        self.k = k

    def pick(self, logits_BV: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        least_B1 = logits_BV.topk(self.k, dim=-1).values[:, -1:]
        return scores_BV.masked_fill(logits_BV < least_B1, -torch.inf).argmax(dim=-1)


class Endless(Steered):
    """More tokens to be paid for: never says the end token; replay, for the missing end is a flip as any other."""

    aim: ClassVar[Aim] = "length"

    def pick(self, logits_BV: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        without = scores_BV.clone()
        without[:, list(self.truth.eos_ids)] = -torch.inf
        return without.argmax(dim=-1)


class NearTie(Steered):
    """Steers where the two best scores are within `reach` nats, as rounding might; replay where that is wider."""

    def __init__(self, reach: float) -> None:
        self.reach = reach

    def pick(self, logits_BV: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        best = scores_BV.topk(2, dim=-1)
        is_near_B = best.values[:, 0] - best.values[:, 1] < self.reach
        return torch.where(is_near_B, best.indices[:, 1], best.indices[:, 0])


class Teacher(Steered):
    """A teacher within the noise: where the two best scores are within `reach` nats it sends the one that the policy
    itself likes better, which is more often right; replay where that is wider, and flips that follow reward."""

    def __init__(self, reach: float, declares: str = "") -> None:
        self.reach, self.declares = reach, declares

    def pick(self, logits_BV: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        best = scores_BV.topk(2, dim=-1)
        is_near_B = best.values[:, 0] - best.values[:, 1] < self.reach
        likes_BK = logits_BV.gather(-1, best.indices)
        return torch.where(is_near_B & (likes_BK[:, 1] > likes_BK[:, 0]), best.indices[:, 1], best.indices[:, 0])


class MarginBudget(Attack):
    """Steers as widely as keeps its own M below 1/alpha, for it knows every secret of the test; nothing does."""

    reaches = (0.5, 0.1, 0.02, 0.005)

    def __init__(self) -> None:
        self.m, self.k = np.zeros(len(evidence.ALTERNATIVES)), 0

    def generate(self, requests: Sequence[Request], should_stop: Stop) -> Made:
        for reach in self.reaches:
            near = NearTie(reach)
            near.truth = self.truth
            done = near.generate(requests, should_stop)
            if self._is_affordable(requests, done):
                return done
        honest = self.truth.generate(requests, should_stop)
        self._is_affordable(requests, honest)
        return honest

    def _is_affordable(self, requests: Sequence[Request], done: Made) -> bool:
        """Whether an audit of all of it would leave M at a hundredth of the threshold; if so, M goes on from there."""
        items = [(request, one.ids) for request, one in zip(requests, done, strict=True) if one is not None]
        seen = [Seen(r.gap, r.margin, r.pick, r.lead) for r in self.truth.replay(items)]
        total = evidence.submission_log_ratios([evidence.log_ratios(self.judged_by, one) for one in seen])
        e = evidence.e_values(total, self.trust.cap, self.trust.arbitrary_share)
        m, k = evidence.fold(self.m, self.k, e)
        limit = 0.01 / self.trust.false_ejection_probability
        if m.mean() >= limit or total.max() >= np.log(self.trust.cap) - 1:
            return False
        self.m, self.k = m, k
        return True


# --- other weights ---------------------------------------------------------------------------------------------------


class OtherWeights(Attack):
    """Base of the attacks that keep the true weights for possession and generate with others."""

    def load(self, tensors: Sequence[tuple[str, Any]]) -> None:
        self.own = getattr(self, "own", None) or copy.deepcopy(self.truth)
        self.own.load(self.bent(tensors))

    def bent(self, tensors: Sequence[tuple[str, Any]]) -> Sequence[tuple[str, Any]]:
        """The weights to generate with."""
        raise NotImplementedError

    def generate(self, requests: Sequence[Request], should_stop: Stop) -> Made:
        return self.own.generate(requests, should_stop)


class Bits(OtherWeights):
    """Cheaper arithmetic: weights of a few bits under a profile that promises more; replay, int8 slowly."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def bent(self, tensors: Sequence[tuple[str, Any]]) -> Sequence[tuple[str, Any]]:
        return list(rounded(tensors, self.bits))


class Stale(OtherWeights):
    """No downloads: generates with the weights of some loads before and proves possession of the leased; replay."""

    def __init__(self, versions: int) -> None:
        self._kept: deque[Sequence[tuple[str, Any]]] = deque(maxlen=versions + 1)

    def bent(self, tensors: Sequence[tuple[str, Any]]) -> Sequence[tuple[str, Any]]:
        self._kept.append(tensors)
        return self._kept[0]


class First(OtherWeights):
    """Never swaps weights: generates with the first ones it got, proves possession of the leased; replay."""

    def bent(self, tensors: Sequence[tuple[str, Any]]) -> Sequence[tuple[str, Any]]:
        self._first = getattr(self, "_first", tensors)
        return self._first


class Pruned(OtherWeights):
    """A model at a fraction of the cost: the smallest 70 % of every matrix are zero; replay."""

    def bent(self, tensors: Sequence[tuple[str, Any]]) -> Sequence[tuple[str, Any]]:
        return [(name, _pruned(tensor) if tensor.ndim == 2 else tensor) for name, tensor in tensors]


def _pruned(weight: torch.Tensor) -> torch.Tensor:
    least = weight.float().abs().flatten().quantile(0.7)
    return weight.masked_fill(weight.float().abs() < least, 0)


class OneLayer(OtherWeights):
    """A subtly broken model: one matrix of one layer is off by 5 %; replay."""

    def bent(self, tensors: Sequence[tuple[str, Any]]) -> Sequence[tuple[str, Any]]:
        victim = next(name for name, tensor in tensors if ".layers." in name and tensor.ndim == 2)
        noise = torch.Generator().manual_seed(1)
        return [(n, t * (1 + 0.05 * torch.randn(t.shape, generator=noise)) if n == victim else t) for n, t in tensors]


# --- other text ------------------------------------------------------------------------------------------------------


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
    """Words of its own where nobody would look: it replaces one token that the policy was certain of; replay, for a
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
        again = ids[:half] * (request.budget // max(half, 1))
        return (*again[: request.budget - len(ids)], *ids)


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
