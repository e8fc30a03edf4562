"""One optimizer step on a batch of rollouts: behaviour log-probabilities, loss, accumulation, clip, AdamW.

Legend: B rollouts, T positions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from farflung.learner.loss import LossParts, Normalise, clipped_loss, denominator, mismatch_kl
from farflung.learner.pack import MicroBatch
from farflung.learner.policy import Policy


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
    epsilon: float = 0.2
    delta: float = 4.0
    normalise: Normalise = "token"
    constant: float = 1.0
    """Tokens per rollout that `normalise = "constant"` divides by; the token budget is the usual choice."""


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one step did; means are over its trained tokens."""

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


class Learner:
    """A policy and its optimizer; `updates` counts optimizer updates since the beginning."""

    def __init__(self, policy: Policy, settings: Optimisation | None = None) -> None:
        self.policy = policy
        self.settings = settings or Optimisation()
        self.updates = 0
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in policy.model.parameters() if parameter.requires_grad],
            lr=self.settings.lr,
            betas=(self.settings.beta1, self.settings.beta2),
            weight_decay=self.settings.weight_decay,
            fused=True,
        )

    def step(self, microbatches: Sequence[MicroBatch], old_logp: Sequence[torch.Tensor] | None = None) -> StepMetrics:
        """Take one step; bit for bit the same from the same state, batch, machine and number of threads.

        `old_logp` (B, T) per micro-batch is the behaviour policy's, recomputed on the trusted side from retained
        weights. By default it is the present policy's as the step begins, so the first update has ratio 1.
        """
        tally = _Tally()
        with _deterministic():
            if old_logp is None:
                old_logp = self._behaviour(microbatches)
            count = self.settings.minibatches
            for k in range(min(count, len(microbatches))):
                self._update(microbatches[k::count], old_logp[k::count] if old_logp else None, tally)
        return tally.metrics(self._lr())

    def _behaviour(self, microbatches: Sequence[MicroBatch]) -> list[torch.Tensor] | None:
        """Log-probabilities before the first update; None if there is only one update, whose own pass yields them."""
        if min(self.settings.minibatches, len(microbatches)) <= 1:
            return None
        with torch.no_grad():
            return [self.policy.logp_BT(micro) for micro in microbatches]

    def _update(
        self, microbatches: Sequence[MicroBatch], old_logp: Sequence[torch.Tensor] | None, tally: "_Tally"
    ) -> None:
        settings = self.settings
        total = sum(denominator(micro.mask_BT, settings.normalise, settings.constant) for micro in microbatches)
        self.optimizer.zero_grad(set_to_none=True)
        for k, micro in enumerate(microbatches):
            loss = self._loss(micro.to(self.policy.device), old_logp[k] if old_logp else None, total, tally)
            loss.backward()
        parameters = self.optimizer.param_groups[0]["params"]
        tally.grad_norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)))
        self.updates += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr()
        self.optimizer.step()

    def _loss(self, micro: MicroBatch, old_logp_BT: torch.Tensor | None, total: float, tally: "_Tally") -> torch.Tensor:
        logp_BT, entropy_BT = self.policy.logp_entropy_BT(micro)
        loss, parts = clipped_loss(
            logp_BT,
            logp_BT.detach() if old_logp_BT is None else old_logp_BT,
            micro.adv_B,
            micro.mask_BT,
            epsilon=self.settings.epsilon,
            delta=self.settings.delta,
            normalise=self.settings.normalise,
            constant=self.settings.constant,
            total=total,
        )
        tally.add(float(loss.detach()), parts, float(entropy_BT.sum()))
        tally.compare(micro, logp_BT.detach() if old_logp_BT is None else old_logp_BT)
        return loss

    def _lr(self) -> float:
        """Linear warm-up over the first updates, then constant."""
        return self.settings.lr * min(1.0, self.updates / max(self.settings.warmup_steps, 1))


class _Tally:
    """Sums over the micro-batches of one step."""

    def __init__(self) -> None:
        self.grad_norms: list[float] = []
        self._loss = self._clipped = self._ratio_sum = self._ratio_max = self._entropy = self._kl = 0.0
        self._tokens = self._claimed = 0

    def add(self, loss: float, parts: LossParts, entropy: float) -> None:
        self._loss += loss
        self._tokens += parts.tokens
        self._clipped += parts.clipped
        self._ratio_sum += parts.ratio_sum
        self._ratio_max = max(self._ratio_max, parts.ratio_max)
        self._entropy += entropy

    def compare(self, micro: MicroBatch, logp_BT: torch.Tensor) -> None:
        """Add the distance between what workers claimed and what we found, where they claimed anything."""
        if micro.worker_logp_BT is None:
            return
        is_claimed_BT = micro.mask_BT & ~micro.worker_logp_BT.isnan()
        self._kl += mismatch_kl(micro.worker_logp_BT, logp_BT, is_claimed_BT)
        self._claimed += int(is_claimed_BT.sum())

    def metrics(self, lr: float) -> StepMetrics:
        tokens, updates = max(self._tokens, 1), max(len(self.grad_norms), 1)
        return StepMetrics(
            loss=self._loss / updates,
            grad_norm=sum(self.grad_norms) / updates,
            clip_fraction=self._clipped / tokens,
            ratio_mean=self._ratio_sum / tokens,
            ratio_max=self._ratio_max,
            entropy=self._entropy / tokens,
            mismatch_kl=self._kl / max(self._claimed, 1),
            tokens=self._tokens,
            lr=lr,
        )


@contextmanager
def _deterministic() -> Iterator[None]:
    """Deterministic kernels while a step runs; where one is missing torch warns instead of stopping the run.

    torch would also fill every uninitialised tensor, which costs bandwidth and guards against nothing here.
    """
    was_on, was_warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=was_warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill
