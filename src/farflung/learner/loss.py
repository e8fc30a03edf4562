"""Advantages and policy losses: pure functions of tensors.

Legend: G groups, S samples of one group, B rollouts, T positions of their completions.
Every loss is of one token and is then averaged by one of three normalisers, so that they can be compared.

    grpo    clip on both sides: GRPO, Shao et al. 2024 (arXiv:2402.03300), with the bound from above for negative
            advantages of INTELLECT-2 (arXiv:2505.07291)
    cispo   clipped importance weights without gradient: MiniMax-M1, 2025 (arXiv:2506.13585)
    gspo    one ratio for a whole sequence, its geometric mean: Zheng et al. 2025 (arXiv:2507.18071)

Dr.GRPO, Liu et al. 2025 (arXiv:2503.20783), is advantages without the division and the constant normaliser; DAPO, Yu et
al. 2025 (arXiv:2503.14476), the token normaliser and a wider clip from above. KL: k3 of Schulman 2020. Truncated
importance weights: Espeholt et al. 2018 (arXiv:1802.01561), with the proximal policy of Hilton et al. 2021
(arXiv:2110.00641).
"""

from dataclasses import dataclass
from typing import Literal

import torch

Normalise = Literal["token", "sequence", "constant"]
Kind = Literal["grpo", "cispo", "gspo"]
_MOST_LOG_RATIO = 20.0
"""Ratios beyond exp of this are cut before they overflow; no bound in use comes near."""


@dataclass(frozen=True, slots=True)
class Objective:
    """Which loss, and its numbers."""

    kind: Kind = "grpo"
    epsilon: float = 0.2
    """Clip of the ratio below 1; and above, where `epsilon_high` is 0. The paper on gspo takes 3e-4 and 4e-4."""
    epsilon_high: float = 0.0
    """Clip of the ratio above 1: DAPO takes 0.28. For cispo, the importance weight is held to 1 plus this."""
    delta: float = 4.0
    """grpo: bound of the ratio where the advantage is negative."""
    normalise: Normalise = "token"
    constant: float = 1.0
    """Tokens per rollout that `normalise = "constant"` divides by; the most tokens of a rollout is the usual choice."""
    kl: float = 0.0
    """Weight of k3, an estimate of KL(policy || reference)."""
    entropy: float = 0.0
    """Weight of the entropy that is rewarded."""

    @property
    def high(self) -> float:
        """Clip of the ratio above 1."""
        return self.epsilon_high or self.epsilon


@dataclass(frozen=True, slots=True)
class Sample:
    """The tensors that one micro-batch is judged by; all (B, T) but the advantages."""

    logp_BT: torch.Tensor
    """Of the policy in training, with gradient."""
    old_logp_BT: torch.Tensor
    """Of the policy as the step begins; the ratio is taken against it."""
    adv_B: torch.Tensor
    mask_BT: torch.Tensor
    weight_BT: torch.Tensor | None = None
    """Importance weights of stale rollouts, see `importance`."""
    reference_logp_BT: torch.Tensor | None = None
    entropy_BT: torch.Tensor | None = None
    """With gradient, if the objective rewards it."""


@dataclass(frozen=True, slots=True)
class LossParts:
    """Sums over the trained tokens of one micro-batch, so that micro-batches add up."""

    tokens: int
    clipped: float
    """Tokens whose gradient the clip removed; for cispo, whose weight it cut."""
    ratio_sum: float
    ratio_max: float
    kl_sum: float = 0.0
    """Of k3 to the reference, 0 without one."""


def advantages(rewards_GS: torch.Tensor, *, divide_by_std: bool = True, eps: float = 1e-4) -> torch.Tensor:
    """Reward minus the group's mean, by default over the group's standard deviation + eps; float32 (G, S).

    A_gs = (r_gs - mean_s r_gs) / (std_s r_gs + eps), with the population's standard deviation: a group of one has
    advantage 0, not NaN. Without the division (Dr.GRPO) hard and easy tasks are not weighted up.
    """
    rewards_GS = rewards_GS.float()
    centred_GS = rewards_GS - rewards_GS.mean(dim=1, keepdim=True)
    if not divide_by_std:
        return centred_GS
    return centred_GS / (rewards_GS.std(dim=1, keepdim=True, correction=0) + eps)


def denominator(mask_BT: torch.Tensor, normalise: Normalise, constant: float = 1.0) -> float:
    """The divisor of a minibatch's summed loss; add it up over the micro-batches of one optimizer step.

    token: trained tokens. sequence: rollouts that train at all. constant: rollouts x `constant` tokens (Dr.GRPO).
    """
    if normalise == "token":
        return float(mask_BT.sum())
    if normalise == "sequence":
        return float(mask_BT.any(dim=1).sum())
    return float(len(mask_BT)) * constant


def policy_loss(
    sample: Sample, objective: Objective | None = None, total: float | None = None
) -> tuple[torch.Tensor, LossParts]:
    """Loss and its parts. `total` is the denominator of the whole minibatch where this is one micro-batch of it."""
    objective = objective or Objective()
    mask_BT = sample.mask_BT.bool()
    gap_BT = torch.where(mask_BT, sample.logp_BT - sample.old_logp_BT, 0.0).clamp(-_MOST_LOG_RATIO, _MOST_LOG_RATIO)
    token_BT, ratio_BT, is_cut_BT = _KINDS[objective.kind](gap_BT, sample.adv_B[:, None], mask_BT, objective)
    if sample.weight_BT is not None:
        token_BT = token_BT * sample.weight_BT
    kl_BT = _kl(sample, mask_BT)
    if kl_BT is not None:
        token_BT = token_BT + objective.kl * kl_BT
    if objective.entropy and sample.entropy_BT is not None:
        token_BT = token_BT - objective.entropy * sample.entropy_BT
    total = denominator(mask_BT, objective.normalise, objective.constant) if total is None else total
    return _mean(token_BT, mask_BT, objective.normalise, total), _parts(ratio_BT.detach(), is_cut_BT, mask_BT, kl_BT)


def importance(old_logp_BT: torch.Tensor, behaviour_logp_BT: torch.Tensor, cap: float) -> torch.Tensor:
    """min(pi_old / pi_behaviour, cap), without gradient: how much more, or less, a stale token counts today.

    Both are log-probabilities recomputed on the trusted side: of the policy as the step begins, and of the weights
    that the rollout was leased at. Where that one is not-a-number the rollout is fresh and counts 1.
    """
    gap_BT = torch.nan_to_num((old_logp_BT - behaviour_logp_BT).detach(), nan=0.0)
    return gap_BT.clamp(-_MOST_LOG_RATIO, _MOST_LOG_RATIO).exp().clamp(max=cap)


def k3(reference_logp_BT: torch.Tensor, logp_BT: torch.Tensor) -> torch.Tensor:
    """exp(d) - 1 - d with d = reference - policy: never negative, and its mean over the policy's tokens is the KL."""
    gap_BT = (reference_logp_BT - logp_BT).clamp(-_MOST_LOG_RATIO, _MOST_LOG_RATIO)
    return gap_BT.exp() - 1 - gap_BT


def mismatch_kl(worker_logp_BT: torch.Tensor, logp_BT: torch.Tensor, mask_BT: torch.Tensor) -> float:
    """Sum over trained tokens of exp(d) - 1 - d with d = logp - worker_logp, estimating KL(worker || trusted).

    A worker may send anything: not-a-number counts as 0 and d is held within +-10, so the metric stays finite.
    """
    gap_BT = torch.nan_to_num(logp_BT - worker_logp_BT, nan=0.0).clamp(-10, 10)
    return float(torch.where(mask_BT.bool(), gap_BT.exp() - 1 - gap_BT, 0.0).sum())


# --- the kinds: (loss, ratio, whether the clip took effect), each (B, T) ---------------------------------------------

_Token = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _grpo(gap_BT: torch.Tensor, adv_B1: torch.Tensor, _: torch.Tensor, objective: Objective) -> _Token:
    """-min(min(r, delta) A, clip(r, 1 - epsilon, 1 + high) A).

    For A < 0 plain PPO leaves the ratio unbounded above, and one rare token could throw the policy; delta bounds it.
    """
    ratio_BT = gap_BT.exp()
    low, high = 1 - objective.epsilon, 1 + objective.high
    free_BT, held_BT = ratio_BT.clamp(max=objective.delta) * adv_B1, ratio_BT.clamp(low, high) * adv_B1
    is_above_BT = (adv_B1 > 0) & (ratio_BT > high) | (adv_B1 < 0) & (ratio_BT > objective.delta)
    return -torch.minimum(free_BT, held_BT), ratio_BT, is_above_BT | (adv_B1 < 0) & (ratio_BT < low)


def _cispo(gap_BT: torch.Tensor, adv_B1: torch.Tensor, _: torch.Tensor, objective: Objective) -> _Token:
    """-stop(min(r, 1 + high)) A log pi: no token loses its gradient, however far its ratio has moved.

    Written with log pi - log old, which has the same gradient and is 0 as the step begins.
    """
    ratio_BT = gap_BT.detach().exp()
    return -ratio_BT.clamp(max=1 + objective.high) * adv_B1 * gap_BT, ratio_BT, ratio_BT > 1 + objective.high


def _gspo(gap_BT: torch.Tensor, adv_B1: torch.Tensor, mask_BT: torch.Tensor, objective: Objective) -> _Token:
    """-min(s A, clip(s, 1 - epsilon, 1 + high) A) with s = exp(mean over the sequence of log r), at each token."""
    mean_B1 = gap_BT.sum(dim=1, keepdim=True) / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    ratio_BT = mean_B1.exp().expand_as(gap_BT)
    low, high = 1 - objective.epsilon, 1 + objective.high
    is_cut_BT = (adv_B1 > 0) & (ratio_BT > high) | (adv_B1 < 0) & (ratio_BT < low)
    return -torch.minimum(ratio_BT * adv_B1, ratio_BT.clamp(low, high) * adv_B1), ratio_BT, is_cut_BT


_KINDS = {"grpo": _grpo, "cispo": _cispo, "gspo": _gspo}


def _kl(sample: Sample, mask_BT: torch.Tensor) -> torch.Tensor | None:
    if sample.reference_logp_BT is None:
        return None
    return k3(torch.where(mask_BT, sample.reference_logp_BT, 0.0), torch.where(mask_BT, sample.logp_BT, 0.0))


def _mean(token_BT: torch.Tensor, mask_BT: torch.Tensor, normalise: Normalise, total: float) -> torch.Tensor:
    loss_BT = torch.where(mask_BT, token_BT, 0.0)
    if normalise == "sequence":
        loss_BT = loss_BT / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    return loss_BT.sum() / max(total, 1e-9)


def _parts(
    ratio_BT: torch.Tensor, is_cut_BT: torch.Tensor, mask_BT: torch.Tensor, kl_BT: torch.Tensor | None
) -> LossParts:
    ratio_N = ratio_BT[mask_BT]
    return LossParts(
        tokens=len(ratio_N),
        clipped=float(is_cut_BT[mask_BT].sum()),
        ratio_sum=float(ratio_N.sum()),
        ratio_max=float(ratio_N.max()) if len(ratio_N) else 0.0,
        kl_sum=0.0 if kl_BT is None else float(kl_BT.detach()[mask_BT].sum()),
    )
