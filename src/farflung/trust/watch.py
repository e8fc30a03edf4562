"""Watches for steering within the noise: every rollout that is replayed adds to two tests per key. Pure; no torch.

Where the two best scores are closer than arithmetic resolves, a node may send either and stay honest by any test on one
rollout. What it cannot hide is that its flips serve it. Of each replayed rollout two numbers are kept: its flips x, and
the flips a = Σ q₀(Δ) that its profile allows at most.

*excess*: each flip of an honest node has probability q₀ at most, so E[(1 + δ)^x] ≤ exp(δ·a), and (1 + δ)^x·exp(−δ·a) is
an e-value for each δ of a grid.

*steering*: a near-tie goes either way by rounding, which knows nothing of rewards. Given how often a node flipped in
its samples of one task, each of these flips is in rollout j with probability a_j ÷ Σ a, so the product over flips of
1 + λ·(R_j − R̄)/spread, with R̄ = Σ a_j·R_j ÷ Σ a, has mean 1: whatever the node's noise, whatever the task. It grows
for those whose flips are where the rewards are. (A flip sends the token that lost, which the policy likes no better
than the one that won: honest flips are a little more often in wrong answers, and that is on the safe side.)

Both are folded as in `farflung.trust.evidence`: anytime-valid, each sample once. What is within the noise and serves no
reward is not seen; how much that can be is `bits`.
"""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from farflung.trust import evidence
from farflung.trust.evidence import Profile, Seen, allowed_at, check, flips

EXCESS: Final = (1.0, 4.0, 16.0)
"""By how much more often than allowed a cheat may flip."""
STEERING: Final = (0.45, 0.9)
"""How strongly a cheat's flips may follow reward."""
WARY: Final = 1e3
"""The statistic from which on all work of a node is audited."""


class Look(NamedTuple):
    """What the replay of one rollout came to, and its reward."""

    flips: int
    allowed: float
    """Flips that honest arithmetic makes at most, on average."""
    reward: float


def flips_and_allowed(profile: Profile, seen: Seen) -> tuple[int, float]:
    """The flips of one rollout, and how many its profile allows at most on average."""
    check(seen)
    return flips(seen), float(allowed_at(profile, seen.gap).sum())


def bits(profile: Profile, seen: Seen) -> float:
    """The most that a node can choose in one rollout within what its profile allows, in bits: Σ H(min(q₀, ½))."""
    near0 = np.minimum(allowed_at(profile, seen.gap), 0.5)
    return float(-(near0 * np.log2(near0) + (1 - near0) * np.log2(1 - near0)).sum())


def group_ratios(looks: Sequence[Look]) -> tuple[np.ndarray, np.ndarray]:
    """ln of the e-values of a node's samples of one task: (EXCESS,) and (STEERING,)."""
    flipped, allowed, reward = np.array(looks, float).reshape(-1, 3).T
    excess = np.array([flipped.sum() * math.log1p(more) - more * allowed.sum() for more in EXCESS])
    spread, weight = np.ptp(reward) if len(reward) else 0.0, allowed.sum()
    if spread <= 0 or weight <= 0:
        return excess, np.zeros(len(STEERING))
    pull = (reward - (allowed * reward).sum() / weight) / spread
    return excess, np.array([(flipped * np.log1p(strength * pull)).sum() for strength in STEERING])


def gain(looks: Sequence[Look]) -> float:
    """By how much reward the flips of these samples lie above what chance would give them, summed."""
    flipped, allowed, reward = np.array(looks, float).reshape(-1, 3).T
    return (
        float((flipped * reward).sum() - flipped.sum() * (allowed * reward).sum() / allowed.sum())
        if allowed.sum()
        else 0.0
    )


def fold(m: Sequence[float], k: int, log_ratios: np.ndarray) -> tuple[float, ...]:
    """Both processes after the k-th group."""
    e = np.exp(np.minimum(log_ratios, math.log(evidence.CAP)))
    return tuple(evidence.fold(np.array(m), k, e)[0].tolist())
