"""Attacks that pick other tokens under the leased noise.

Each docstring says what the attack would gain, then what stops it.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from farflung.engine.base import Completion, Request
from farflung.engine.noise import gumbel
from farflung.redteam.adversary import Aim, Attack, Made, Stop
from farflung.trust import evidence
from farflung.trust.evidence import Seen

Pick = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits (B, V), scores with the leased noise (B, V)) → token (B,)."""


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
        logits_BTV = model(input_ids=ids_BT.to(model.device), use_cache=False).logits
        logits_BV = logits_BTV[torch.arange(len(rows)), last_B].float().cpu()
        temperature_B1 = torch.tensor([max(requests[i].temperature, 1e-6) for i in live])[:, None]
        seeds, places = [requests[i].seed for i in live], [requests[i].first_position + len(said[i]) for i in live]
        scores_BV = logits_BV / temperature_B1 + gumbel(seeds, places, logits_BV.shape[1])
        for i, token in zip(live, pick(logits_BV, scores_BV).tolist(), strict=True):
            said[i].append(token)
        live = [i for i in live if not ends(said[i]) and len(said[i]) < requests[i].max_new_tokens]
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
        limit = 0.01 * evidence.limit(self.trust.false_ejection_probability)
        if m.mean() >= limit or total.max() >= np.log(self.trust.cap) - 1:
            return False
        self.m, self.k = m, k
        return True
