"""Watches for steering within the noise: every rollout that is replayed adds to three tests per key. Pure; no torch.

Where the two best scores are closer than arithmetic resolves, a node may send either and stay honest by any test on one
rollout. But it cannot hide that its flips serve it. Of each replayed rollout three numbers are kept: its flips x,
how many of them are *liked*, sent a token which the policy likes better than the one that won, and the flips
a = Σ q₀(Δ) that its profile allows at most.

*excess*: each flip of an honest node has probability q₀ at most, so E[(1 + δ)^x] ≤ exp(δ·a), and (1 + δ)^x·exp(−δ·a) is
an e-value for each δ of a grid.

*steering*: a near-tie goes either way by rounding, which knows nothing of rewards. Given how often a node flipped in
its samples of one task, each of these flips is in rollout j with probability a_j ÷ Σ a, so the product over flips of
1 + λ·(R_j − R̄)/spread, with R̄ = Σ a_j·R_j ÷ Σ a, has mean 1: whatever the node's noise, whatever the task. It grows
for those whose flips are where the rewards are. (A flip sends the token that lost, which the policy likes no better
than the one that won: honest flips are a little more often in wrong answers, and that is on the safe side.)

*leaning*: rounding does not know either which token the policy likes better. Between two scores as close as rounding
the likelier token wins as often as the other or more (the difference of two Gumbel draws is logistic, its mode at 0),
so that honest flips, which undo it, go to the likelier at most every second time, however large the noise. A machine
may be biased; the profile's p₀ says how far. With odds k times those of p₀ a liked flip counts k/(1 + (k − 1)·p₀) and
any other 1/(1 + (k − 1)·p₀), whose mean is 1 at p₀ and less below. It grows for those who say what the policy likes.

All are folded as in `farflung.trust.evidence`: anytime-valid, each sample once. Flips within the noise that serve no
reward are not seen; how much that can be is `bits`.
"""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from farflung.trust import evidence
from farflung.trust.evidence import TIE, Profile, Seen, allowed_at, check

EXCESS: Final = (1.0, 4.0, 16.0)
"""By how much more often than allowed a cheat may flip."""
STEERING: Final = (0.45, 0.9)
"""How strongly a cheat's flips may follow reward."""
LEANING: Final = (4.0, 16.0)
"""How many times the odds of an honest flip to be a liked one those of a cheat's may be."""
WARY: Final = 1e3
"""The statistic from which on all work of a node is audited."""


class Flips(NamedTuple):
    """The flips in one rollout's replay."""

    flips: int
    liked: int
    """Flips that sent a token which the policy likes better than the one that won."""
    allowed: float
    """Flips that honest arithmetic makes at most, on average."""


class WatchedRollout(NamedTuple):
    """The same, with the reward of the rollout and what of its node's profile it takes to weigh it."""

    flips: int
    liked: int
    allowed: float
    reward: float
    likely: float
    """The share of honest flips that are liked at most, `Profile.liked`."""


class Ratios(NamedTuple):
    """ln of the e-values of a node's samples of one task, (EXCESS,), (STEERING,) and (LEANING,)."""

    excess: np.ndarray
    steering: np.ndarray
    leaning: np.ndarray


def count_flips(profile: Profile, seen: Seen) -> Flips:
    """The flips of one rollout, and how many its profile allows.

    A flip to a third token counts as liked: of that token a replay does not tell, and the honest make few.
    """
    check(seen)
    is_flip = np.asarray(seen.margin) > TIE
    is_liked = (np.asarray(seen.lead) > 0) | (np.asarray(seen.margin) > seen.gap)
    return Flips(int(is_flip.sum()), int((is_flip & is_liked).sum()), float(allowed_at(profile, seen.gap).sum()))


def bits(profile: Profile, seen: Seen) -> float:
    """The most that a node can choose in one rollout within what its profile allows, in bits: Σ H(min(q₀, ½))."""
    near0 = np.minimum(allowed_at(profile, seen.gap), 0.5)
    return float(-(near0 * np.log2(near0) + (1 - near0) * np.log2(1 - near0)).sum())


def limit(alpha: float) -> float:
    """Where the mean of steering and leaning ejects a key: this test has what that of audits leaves of α."""
    return 1 / ((1 - evidence.ALPHA_SHARE) * alpha)


def group_ratios(looks: Sequence[WatchedRollout]) -> Ratios:
    """The ratios from a node's samples of one task."""
    flipped, liked, allowed, reward, likely = np.array(looks, float).reshape(-1, len(WatchedRollout._fields)).T
    excess = [flipped.sum() * math.log1p(more) - more * allowed.sum() for more in EXCESS]
    leaning = [(liked * math.log(k) - flipped * np.log1p((k - 1) * likely)).sum() for k in LEANING]
    return Ratios(np.array(excess), _steering(flipped, allowed, reward), np.array(leaning))


def _steering(flipped: np.ndarray, allowed: np.ndarray, reward: np.ndarray) -> np.ndarray:
    spread, weight = np.ptp(reward) if len(reward) else 0.0, allowed.sum()
    if spread <= 0 or weight <= 0:
        return np.zeros(len(STEERING))
    pull = (reward - (allowed * reward).sum() / weight) / spread
    return np.array([(flipped * np.log1p(strength * pull)).sum() for strength in STEERING])


def gain(looks: Sequence[WatchedRollout]) -> float:
    """By how much reward the flips of these samples lie above what chance would give them, summed."""
    flipped, _, allowed, reward, _ = np.array(looks, float).reshape(-1, len(WatchedRollout._fields)).T
    return (
        float((flipped * reward).sum() - flipped.sum() * (allowed * reward).sum() / allowed.sum())
        if allowed.sum()
        else 0.0
    )


def fold(m: Sequence[float], k: int, log_ratios: np.ndarray) -> tuple[float, ...]:
    """A process after the k-th group."""
    e = np.exp(np.minimum(log_ratios, math.log(evidence.CAP)))
    return tuple(evidence.fold(np.array(m), k, e)[0].tolist())
