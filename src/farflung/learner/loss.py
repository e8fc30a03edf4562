"""Advantages and the two-sided-clip GRPO loss: pure functions of tensors.

Legend: G groups, S samples of one group, B rollouts, T positions.
Sources: GRPO, Shao et al. 2024 (arXiv:2402.03300); Dr.GRPO, Liu et al. 2025 (arXiv:2503.20783), for advantages without
the division and for the constant normaliser; token mean, DAPO, Yu et al. 2025 (arXiv:2503.14476); clip from above for
negative advantages, INTELLECT-2 (arXiv:2505.07291).
"""

from dataclasses import dataclass
from typing import Literal

import torch

Normalise = Literal["token", "sequence", "constant"]


@dataclass(frozen=True, slots=True)
class LossParts:
    """Sums over the trained tokens of one micro-batch, so that micro-batches add up."""

    tokens: int
    clipped: float
    """Tokens whose gradient the clip removed."""
    ratio_sum: float
    ratio_max: float


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
    """What a minibatch's summed loss is divided by; add it up over the micro-batches of one optimizer step.

    token: trained tokens. sequence: rollouts that train at all. constant: rollouts x `constant` tokens (Dr.GRPO).
    """
    if normalise == "token":
        return float(mask_BT.sum())
    if normalise == "sequence":
        return float(mask_BT.any(dim=1).sum())
    return float(len(mask_BT)) * constant


def clipped_loss(
    logp_BT: torch.Tensor,
    old_logp_BT: torch.Tensor,
    adv_B: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    epsilon: float = 0.2,
    delta: float = 4.0,
    normalise: Normalise = "token",
    constant: float = 1.0,
    total: float | None = None,
) -> tuple[torch.Tensor, LossParts]:
    """Loss and its parts. `total` is the denominator of the whole minibatch where this is one micro-batch of it.

    With r = exp(logp - old_logp):  loss_bt = -min(min(r, delta) A_b, clip(r, 1 - epsilon, 1 + epsilon) A_b).
    For A < 0 plain PPO leaves the ratio unbounded above, and one rare token could throw the policy; delta bounds it.
    """
    mask_BT = mask_BT.bool()
    ratio_BT = torch.where(mask_BT, logp_BT - old_logp_BT, 0.0).exp()
    adv_B1 = adv_B[:, None]
    free_BT = ratio_BT.clamp(max=delta) * adv_B1
    held_BT = ratio_BT.clamp(1 - epsilon, 1 + epsilon) * adv_B1
    loss_BT = torch.where(mask_BT, -torch.minimum(free_BT, held_BT), 0.0)
    if normalise == "sequence":
        loss_BT = loss_BT / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    total = denominator(mask_BT, normalise, constant) if total is None else total
    return loss_BT.sum() / max(total, 1e-9), _parts(ratio_BT.detach(), adv_B1, mask_BT, epsilon, delta)


def mismatch_kl(worker_logp_BT: torch.Tensor, logp_BT: torch.Tensor, mask_BT: torch.Tensor) -> float:
    """Sum over trained tokens of exp(d) - 1 - d with d = logp - worker_logp, estimating KL(worker || trusted).

    A worker may send anything: not-a-number counts as 0 and d is held within +-10, so the metric stays finite.
    """
    gap_BT = torch.nan_to_num(logp_BT - worker_logp_BT, nan=0.0).clamp(-10, 10)
    return float(torch.where(mask_BT.bool(), gap_BT.exp() - 1 - gap_BT, 0.0).sum())


def _parts(
    ratio_BT: torch.Tensor, adv_B1: torch.Tensor, mask_BT: torch.Tensor, epsilon: float, delta: float
) -> LossParts:
    is_above_BT = (adv_B1 > 0) & (ratio_BT > 1 + epsilon) | (adv_B1 < 0) & (ratio_BT > delta)
    is_below_BT = (adv_B1 < 0) & (ratio_BT < 1 - epsilon)
    ratio_N = ratio_BT[mask_BT]
    return LossParts(
        tokens=len(ratio_N),
        clipped=float((is_above_BT | is_below_BT)[mask_BT].sum()),
        ratio_sum=float(ratio_N.sum()),
        ratio_max=float(ratio_N.max()) if len(ratio_N) else 0.0,
    )
