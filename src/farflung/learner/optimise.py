"""One optimizer step on a batch of rollouts: old log-probabilities, loss, accumulation, clip, AdamW.

Legend: B rollouts, T positions of their completions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from farflung.learner.determinism import Determinism
from farflung.learner.loss import LossParts, Objective, Sample, denominator, importance, mismatch_kl, policy_loss
from farflung.learner.moments import HostAdamW
from farflung.learner.pack import MicroBatch, fill
from farflung.learner.policy import Policy
from farflung.learner.ranks import Ranks, add_up, split, whole


@dataclass(frozen=True, slots=True)
class Optimisation:
    """Settings of the optimizer and the loss."""

    lr: float = 1e-6
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0
    warmup_steps: int = 0
    """Optimizer updates over which the learning rate rises linearly to `lr`."""
    max_grad_norm: float = 1.0
    minibatches: int = 1
    """Optimizer updates per step; each takes its share of the micro-batches, dealt out in turn."""
    importance_cap: float = 2.0
    """Most that a stale token counts, where its behaviour log-probability is given."""
    are_moments_on_host: bool = False
    """Whether AdamW's moments live in host memory, and come to the device one parameter after the other."""
    objective: Objective = field(default_factory=Objective)


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """The metrics of one step; means are over its trained tokens."""

    loss: float
    grad_norm: float
    """Before clipping, mean over the updates of the step."""
    clip_fraction: float
    ratio_mean: float
    ratio_max: float
    entropy: float
    """In nats per token, of the policy as it was when the token's turn came."""
    mismatch_kl: float
    """Between the log-probabilities that workers sent and ours, over the tokens for which one came."""
    tokens: int
    lr: float
    kl: float = 0.0
    """To the reference, in nats per token; 0 without one."""
    importance: float = 1.0
    """Importance weight of stale tokens; 1 where none are given."""
    fill: float = 1.0
    """Share of the tokens fed to the model that are no padding."""


class Learner:
    """A policy and its optimizer; `updates` counts optimizer updates since the beginning."""

    def __init__(
        self, policy: Policy, settings: Optimisation | None = None, *, reference: Policy | None = None
    ) -> None:
        """`reference` is what `objective.kl` pulls towards; it is only read."""
        self.policy, self.reference = policy, reference
        self.settings = settings or Optimisation()
        self.updates = 0
        self.determinism = Determinism(is_strict=policy.ranks.is_alone)  # several could not begin a step again
        kind = HostAdamW if self.settings.are_moments_on_host else torch.optim.AdamW
        self.optimizer = kind(
            [parameter for parameter in policy.model.parameters() if parameter.requires_grad],
            lr=self.settings.lr,
            betas=(self.settings.beta1, self.settings.beta2),
            weight_decay=self.settings.weight_decay,
            fused=True,
        )

    def step(
        self,
        microbatches: Sequence[MicroBatch],
        behaviour: Sequence[torch.Tensor] | None = None,
        before: Sequence[torch.Tensor] | None = None,
    ) -> StepMetrics:
        """Take one step; bit for bit the same from the same state, batch, machine and number of threads.

        `behaviour` (B, T) per micro-batch are log-probabilities under the weights that each rollout was leased at,
        recomputed on the trusted side; stale tokens then count by `importance`. The ratio is always taken against the
        policy as the step begins, so it is 1 in the first update. `before` (B, T) are log-probabilities under that
        policy as it was published; where all are given, later updates take them and no pass finds them again.
        """
        ranks = self.policy.ranks
        count = min(self.settings.minibatches, len(microbatches))
        nothing = [None] * len(microbatches)
        known = before if before and all(map(_is_whole, before, microbatches)) else nothing
        given = list(zip(microbatches, behaviour or nothing, known, strict=True))
        updates = [(split(given[k::count], ranks), self._total(microbatches[k::count])) for k in range(count)]
        updates_before = self.updates
        tally = self.determinism.run(partial(self._take, updates), lambda: self.updates == updates_before)
        return tally.metrics(self._lr(), fill(microbatches), ranks)

    def _take(self, updates: Sequence[tuple[Sequence["_Part"], float]]) -> "_Tally":
        """Take the updates of one step, each of some parts and the sum that its loss is divided by."""
        tally = _Tally()
        old = [self._before(parts) if k else [None] * len(parts) for k, (parts, _) in enumerate(updates)]
        for (parts, total), old_logp in zip(updates, old, strict=True):
            self._update(parts, old_logp, total, tally)
        return tally

    def _total(self, microbatches: Sequence[MicroBatch]) -> float:
        objective = self.settings.objective
        return sum(denominator(micro.mask_BT, objective.normalise, objective.constant) for micro in microbatches)

    def _before(self, parts: Sequence["_Part"]) -> list[torch.Tensor]:
        """Log-probabilities before the first update, for later ones; of the first, its own pass yields them."""
        with torch.no_grad():
            return [
                self.policy.logp_BT(micro.to(self.policy.device)) if known_BT is None else known_BT.nan_to_num(0.0)
                for (micro, _, known_BT), _ in parts
            ]

    def _update(
        self, parts: Sequence["_Part"], old_logp: Sequence[torch.Tensor | None], total: float, tally: "_Tally"
    ) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for ((micro, behaviour_BT, _), counts), old_logp_BT in zip(parts, old_logp, strict=True):
            seen = tally if counts else _Tally()
            here = partial(_to, self.policy.device)
            loss = self._loss(micro.to(self.policy.device), here(old_logp_BT), here(behaviour_BT), total, seen)
            (loss * self.policy.ranks.world * counts).backward()  # the reduction takes the mean over ranks
        parameters = self.optimizer.param_groups[0]["params"]
        tally.grad_norms.append(float(whole(torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm))))
        self.updates += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr()
        self.optimizer.step()
        torch.autograd.graph.increment_version(parameters)  # the fused optimizer leaves that out

    def _loss(
        self,
        micro: MicroBatch,
        old_logp_BT: torch.Tensor | None,
        behaviour_BT: torch.Tensor | None,
        total: float,
        tally: "_Tally",
    ) -> torch.Tensor:
        objective = self.settings.objective
        logp_BT, entropy_BT = self.policy.logp_entropy_BT(micro, is_entropy_trained=objective.entropy > 0)
        old_BT = logp_BT.detach() if old_logp_BT is None else old_logp_BT
        weight_BT = None if behaviour_BT is None else importance(old_BT, behaviour_BT, self.settings.importance_cap)
        sample = Sample(
            logp_BT,
            old_BT,
            micro.adv_B,
            micro.mask_BT,
            weight_BT,
            self._reference(micro),
            entropy_BT if objective.entropy else None,
        )
        loss, parts = policy_loss(sample, objective, total)
        tally.add(float(loss.detach()), parts, float(entropy_BT.detach().sum()))
        tally.compare(micro, old_BT, weight_BT)
        return loss

    def _reference(self, micro: MicroBatch) -> torch.Tensor | None:
        if self.reference is None:
            return None
        with torch.no_grad():
            return self.reference.logp_BT(micro)

    def _lr(self) -> float:
        """Linear warm-up over the first updates, then constant."""
        return self.settings.lr * min(1.0, self.updates / max(self.settings.warmup_steps, 1))


_Part = tuple[tuple[MicroBatch, torch.Tensor | None, torch.Tensor | None], bool]
"""A micro-batch, its log-probabilities under stale behaviour policies and before the step, where known, and whether it
counts here."""


def _to(device: torch.device, logp_BT: torch.Tensor | None) -> torch.Tensor | None:
    return None if logp_BT is None else logp_BT.to(device)


def _is_whole(logp_BT: torch.Tensor, micro: MicroBatch) -> bool:
    return not logp_BT[micro.mask_BT].isnan().any()


class _Tally:
    """Sums over the micro-batches of one step."""

    def __init__(self) -> None:
        self.grad_norms: list[float] = []
        self._loss = self._clipped = self._ratio_sum = self._ratio_max = self._entropy = self._kl = 0.0
        self._reference_kl = self._weight = 0.0
        self._tokens = self._claimed = self._weighed = 0

    def add(self, loss: float, parts: LossParts, entropy: float) -> None:
        self._loss += loss
        self._tokens += parts.tokens
        self._clipped += parts.clipped
        self._ratio_sum += parts.ratio_sum
        self._ratio_max = max(self._ratio_max, parts.ratio_max)
        self._entropy += entropy
        self._reference_kl += parts.kl_sum

    def compare(self, micro: MicroBatch, logp_BT: torch.Tensor, weight_BT: torch.Tensor | None) -> None:
        """Add importance weights, and the distance between what workers claimed and what we found, if they did."""
        if weight_BT is not None:
            self._weight += float(weight_BT[micro.mask_BT].sum())
            self._weighed += int(micro.mask_BT.sum())
        if micro.worker_logp_BT is None:
            return
        is_claimed_BT = micro.mask_BT & ~micro.worker_logp_BT.isnan()
        self._kl += mismatch_kl(micro.worker_logp_BT, logp_BT, is_claimed_BT)
        self._claimed += int(is_claimed_BT.sum())

    def metrics(self, lr: float, fill: float, ranks: Ranks) -> StepMetrics:
        sums = (self._loss, self._clipped, self._ratio_sum, self._entropy, self._kl, self._reference_kl, self._weight)
        counts = (self._tokens, self._claimed, self._weighed)
        loss, clipped, ratio, entropy, kl, reference_kl, weight, *totals = add_up((*sums, *counts), ranks)
        tokens, claimed, weighed = (int(total) for total in totals)
        updates = max(len(self.grad_norms), 1)
        return StepMetrics(
            loss=loss / updates,
            grad_norm=sum(self.grad_norms) / updates,
            clip_fraction=clipped / max(tokens, 1),
            ratio_mean=ratio / max(tokens, 1),
            ratio_max=add_up((self._ratio_max,), ranks, is_most=True)[0],
            entropy=entropy / max(tokens, 1),
            mismatch_kl=kl / max(claimed, 1),
            tokens=tokens,
            lr=lr,
            kl=reference_kl / max(tokens, 1),
            importance=weight / weighed if weighed else 1.0,
            fill=fill,
        )
