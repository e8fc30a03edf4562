"""What an audit says: likelihood ratios over replayed positions, and the test that may eject a key. Pure; no torch.

A replay (`farflung.engine.base.Replay`) gives at each position the gap Δ between the two best scores and the margin by
which the token that was sent lost; a margin above a tie is a *flip*. Honest numerics flip near-ties and nothing else:
calibration bounds the honest flip probability q₀(Δ) from above, per bin of Δ, and measures q₁(Δ) of known cheats.

**One rollout.** LR = ∏ (q₁/q₀ if flip, else (1 − q₁)/(1 − q₀)). If the honest flip probability p ≤ q₀ ≤ q₁ at every
position, given the past, then E[factor] = p·q₁/q₀ + (1 − p)·(1 − q₁)/(1 − q₀) grows with p and is 1 at p = q₀, so
E[LR] ≤ 1 whatever the prompt or the entropy of the policy. A share η of honest rollouts may be arbitrarily bad (a
flaky card, a driver update): with the cap c, E[min(LR, c)] ≤ (1 − η) + η·c < 1 + c·η, so e = min(LR, c)/(1 + c·η)
has E[e | past] ≤ 1. The share is meant given the past too: a node that missed a weight update, and so sends a whole
submission of bad rollouts, is not forgiven by η. Whoever feeds this must rule such causes out first.

**One key.** With w_k = 1/(k(k + 1)), whose sum from k + 1 on is 1/(k + 1), let M₀ = 0 and M_k = e_k·(M_{k−1} + w_k).
Unrolled, M_k = Σ_{j ≤ k} w_j·e_j·…·e_k: a mixture over the audit j at which the node might have turned, in the manner
of Shiryaev and Roberts. M alone is no supermartingale (it gains w_k), but N_k = M_k + 1/(k + 1) is: it is ≥ 0, N₀ = 1,
    E[N_k | past] ≤ M_{k−1} + w_k + 1/(k + 1) = M_{k−1} + 1/k = N_{k−1}.
Ville's inequality (1939) gives P(sup N ≥ x) ≤ E[N₀]/x = 1/x, and M < N, so P(M_k ≥ 1/α for any k, ever) ≤ α. It needs
no independence of rollouts, steps or profiles, only E[e_k | past] ≤ 1; hence **rollouts are folded in an order that is
fixed before their evidence is known** (that of submission and index). Folded as they arrive, when bad ones arrive
first, the bound fails. A node that turns after k honest audits pays −ln w_k ≈ 2 ln k nats more than at the start.

Sources: Shafer, Shen, Vereshchagin & Vovk, Test martingales, Bayes factors and p-values, 2011; Ramdas, Grünwald, Vovk
& Shafer, Game-theoretic statistics and safe anytime-valid inference, 2023; Clopper & Pearson 1934 for the bound on q₀.
"""

import math
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Annotated, Final

import msgspec
import numpy as np
from msgspec import Meta

TIE: Final = 1e-5
"""A margin up to this is no flip: it is the rounding of the noise itself in float32."""
EDGES: Final = (1e-4, 1e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Inner edges of the gap bins, chosen before any data was seen; the last bin has no end."""
CEILING: Final = 0.95
"""No flip probability is taken to be higher, so that no single position is worth infinitely much."""
DILUTIONS: Final = (1.0, 0.25, 0.0625, 0.015625)
"""How far a cheat may hide among honest tokens, or behind a policy so sure of itself that sampling seldom differs."""
CAP: Final = 100.0
ETA: Final = 1e-3
ALPHA: Final = 1e-6

Probabilities = Annotated[tuple[float, ...], Meta(min_length=1, max_length=64)]
Counts = Annotated[tuple[int, ...], Meta(min_length=1, max_length=64)]
Sample = tuple[np.ndarray, np.ndarray]
"""Gaps and margins of one or many replayed rollouts, each of shape (tokens,)."""


class Tally(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How often a replay flipped, by bin of the gap.

    It is all that any alternative's likelihood ratio needs, so stored tallies serve alternatives calibrated later.
    """

    positions: Counts
    flips: Counts

    @property
    def tokens(self) -> int:
        """Positions in all bins."""
        return sum(self.positions)


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How honest nodes of one kind of arithmetic flip, and how known cheats do."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    edges: Annotated[tuple[float, ...], Meta(max_length=63)]
    """Inner edges of the gap bins, rising; there is one bin more than edges."""
    q0: Probabilities
    """Upper bound on the honest flip probability, per bin."""
    q1: Annotated[dict[str, Probabilities], Meta(min_length=1, max_length=16)]
    """Flip probability of each alternative, per bin, never below `q0`; where equal, the bin says nothing."""
    honest: Tally
    """The counts that `q0` was calibrated on."""

    def __post_init__(self) -> None:
        bins = len(self.edges) + 1
        rows = (self.q0, self.honest.positions, self.honest.flips, *self.q1.values())
        if any(len(row) != bins for row in rows):
            raise ValueError(f"profile {self.name} has {bins} bins, but its rows {[len(row) for row in rows]}")
        if list(self.edges) != sorted(set(self.edges)) or not all(0 < edge < math.inf for edge in self.edges):
            raise ValueError(f"profile {self.name} has edges {self.edges}; they must rise and be positive")
        pairs = [pair for row in self.q1.values() for pair in zip(self.q0, row, strict=True)]
        if not all(0 < low <= high < 1 for low, high in pairs):
            raise ValueError(f"profile {self.name} must have 0 < q0 <= q1 < 1 in every bin, or the test is unsound")


def to_json(profile: Profile) -> bytes:
    """A profile as canonical JSON: the bytes that an operator signs."""
    return msgspec.json.encode(profile, order="sorted")


def from_json(data: bytes) -> Profile:
    """Read a profile; raises msgspec.ValidationError for unknown fields, wrong types and unsound numbers."""
    return msgspec.json.decode(data, type=Profile)


# --- one rollout -----------------------------------------------------------------------------------------------------


def tally(edges: tuple[float, ...], gap: np.ndarray, margin: np.ndarray) -> Tally:
    """Count positions and flips per bin of the gap. Raises ValueError for NaN, which would pass for no flip."""
    if np.shape(gap) != np.shape(margin) or np.isnan(gap).any() or np.isnan(margin).any():
        raise ValueError(f"gap and margin must be numbers of one shape, not {np.shape(gap)} and {np.shape(margin)}")
    bins = np.searchsorted(edges, gap, side="right")
    flips = bins[np.asarray(margin) > TIE]
    size = len(edges) + 1
    return Tally(_counts(bins, size), _counts(flips, size))


def _counts(bins: np.ndarray, size: int) -> tuple[int, ...]:
    return tuple(np.bincount(bins, minlength=size).tolist())


def log_ratio(profile: Profile, tally: Tally, alternative: str) -> float:
    """ln LR of one rollout: Σ over bins of flips·ln(q₁/q₀) + (positions − flips)·ln((1 − q₁)/(1 − q₀))."""
    q0, q1 = np.array(profile.q0), np.array(profile.q1[alternative])
    flips = np.array(tally.flips)
    stays = np.array(tally.positions) - flips
    return float(flips @ np.log(q1 / q0) + stays @ np.log((1 - q1) / (1 - q0)))


def log_likelihood_ratio(profile: Profile, gap: np.ndarray, margin: np.ndarray, alternative: str) -> float:
    """ln LR of one replayed rollout; `gap` and `margin` of shape (tokens,)."""
    return log_ratio(profile, tally(profile.edges, gap, margin), alternative)


def average_log_ratio(profile: Profile, tally: Tally) -> float:
    """ln of the mean LR over the profile's alternatives, an e-value under the same null. What decides.

    A mean costs at most ln(alternatives) nats, and nothing where the LR is far beyond the cap anyway.
    """
    values = [log_ratio(profile, tally, alternative) for alternative in profile.q1]
    return float(np.logaddexp.reduce(values) - math.log(len(values)))


def rollout_e(log_lr: float, cap: float = CAP, eta: float = ETA) -> float:
    """The e-value of one rollout: min(LR, cap)/(1 + cap·η), computed without overflow."""
    return math.exp(min(log_lr, math.log(cap))) / (1 + cap * eta)


def is_bad_rollout(log_lr: float, cap: float = CAP) -> bool:
    """Whether to void the submission, LR ≥ cap: by Markov's inequality at most 1/cap + η of honest rollouts.

    It never ejects by itself: what voids one submission happens to honest nodes now and then.
    """
    return log_lr >= math.log(cap)


# --- one key ---------------------------------------------------------------------------------------------------------

HIGHEST: Final = 1e300
"""M stops here. Below is harmless too: an M that underflows to 0 is only milder, and the next weight is added to it."""


def fold(m: float, k: int, e: float) -> tuple[float, int]:
    """Take one more audited rollout: (M_{k−1}, k − 1, e_k) → (M_k, k) with M_k = e_k·(M_{k−1} + 1/(k(k + 1)))."""
    k += 1
    return min(e * (m + 1 / (k * (k + 1))), HIGHEST), k


def is_ejected(m: float, alpha: float = ALPHA) -> bool:
    """Whether M ≥ 1/α, which an honest key ever reaches with probability at most α (Ville; see above)."""
    return m >= 1 / alpha


# --- calibration -----------------------------------------------------------------------------------------------------


def calibrate(
    name: str,
    honest: Iterable[Sample],
    cheats: Mapping[str, Iterable[Sample]],
    *,
    edges: tuple[float, ...] = EDGES,
    dilutions: tuple[float, ...] = DILUTIONS,
    tolerance: float = 1e-3,
    error: float = 1e-3,
) -> Profile:
    """Make a profile from replays of trusted nodes and of nodes that cheat on purpose, by the name of the cheat.

    q₀ is the Clopper–Pearson upper bound, exceeded with probability `error` per bin, or `_floor` if that is higher:
    calibration on the validator's own machine flips nothing at all, while honest nodes have other thread counts and
    batch sizes. `tolerance` is the score noise that must be forgiven; 1e-3 is 100 times that of float32.
    Numerics flip a wider gap no more often than a narrow one, so a bin with little data takes the bound of the one
    before. q₁ is (flips + ½)/(positions + 1), not below q₀, and each cheat is also added diluted: q₀ + ε·(q₁ − q₀).
    """
    seen = _pool(edges, honest)
    floors = (_floor(low, tolerance) for low in (0.0, *edges))
    bounds = (_upper_bound(x, n, error) for x, n in zip(seen.flips, seen.positions, strict=True))
    q0 = tuple(accumulate((max(*pair) for pair in zip(bounds, floors, strict=True)), min, initial=CEILING))[1:]
    q1 = {cheat: _alternative(q0, _pool(edges, samples)) for cheat, samples in cheats.items()}
    return Profile(name, edges, q0, _dilute(q0, q1, dilutions), seen)


def _pool(edges: tuple[float, ...], samples: Iterable[Sample]) -> Tally:
    gaps, margins = zip(*samples, strict=True)
    return tally(edges, np.concatenate(gaps), np.concatenate(margins))


def _floor(gap: float, tolerance: float) -> float:
    """Flip probability to forgive at a gap: ½ at a tie, falling as s/Δ (a heavy tail of scale s), never below s."""
    return max(tolerance / (gap + 2 * tolerance), tolerance)


def _alternative(q0: tuple[float, ...], cheat: Tally) -> tuple[float, ...]:
    """q₁ per bin. A bin that the cheat never visits falls back on q₀ and stays silent."""
    counts = zip(q0, cheat.flips, cheat.positions, strict=True)
    return tuple(min(max(low, (x + 0.5) / (n + 1)), CEILING) if n else low for low, x, n in counts)


def _dilute(
    q0: tuple[float, ...], q1: Mapping[str, tuple[float, ...]], dilutions: tuple[float, ...]
) -> dict[str, tuple[float, ...]]:
    """Each cheat as it was and in part: `unseeded`, `unseeded x 0.25`, …"""
    return {
        cheat if part == 1 else f"{cheat} x {part:g}": tuple(
            low + part * (high - low) for low, high in zip(q0, row, strict=True)
        )
        for cheat, row in q1.items()
        for part in dilutions
    }


def _upper_bound(x: int, n: int, error: float) -> float:
    """The Clopper–Pearson upper bound: the q at which P(Binomial(n, q) ≤ x) = error; 1 where there is no data."""
    if x >= n:
        return 1.0
    low, high = x / n, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _binomial_cdf(x, n, middle) > error else (low, middle)
    return high


def _binomial_cdf(x: int, n: int, q: float) -> float:
    """P(Binomial(n, q) ≤ x) for 0 < q < 1, by the ratio of neighbouring terms in log space."""
    i = np.arange(1, x + 1)
    steps = np.log((n - i + 1) / i) + math.log(q) - math.log1p(-q)
    logs = np.concatenate(([0.0], np.cumsum(steps))) + n * math.log1p(-q)
    return math.exp(np.logaddexp.reduce(logs))
