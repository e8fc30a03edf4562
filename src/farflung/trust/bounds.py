"""Bounds on how often honest arithmetic of one kind flips, per position, from replays of trusted nodes. Pure; no torch.

Score noise of scale 1 flips a position of gap Δ with probability P(Δ), which falls as the gap grows: a wider gap needs
more noise. Calibration must give q₀(Δ) ≥ P(Δ) at every single Δ. A bin's own mean bounds nothing at its lower
edge, where flips gather. Two bounds hold there, each by Clopper and Pearson (1934), and the lower one is taken:

*flips*: over any window of positions whose gaps are all narrower than Δ the mean of P is at least P(Δ);
*noise*: a flip needs the noise of the two best scores to differ by more than Δ. Both sides give log-probabilities of
the tokens that were sent, which differ by d; |δ₁ − δ₂| > Δ needs |d| > Δ/2 for one of the two, so that
P(Δ) ≤ 2·P(|d| > Δ/2), and every position has its say, for the Gumbel noise that makes a gap knows nothing of rounding.

No rounding is as large as four times the largest seen, be it the margin of a flip or twice a difference d: a flip by
more than that is far.

**Margin.** Honest machines are not alike, and a stranger's arithmetic may be noisier than the calibrated. Noise of κ
times the scale has P(Δ/κ), so a profile that admits it bounds P(Δ/κ) instead: bounds are read κ times nearer to zero.
An honest node is safe up to κ times the calibrated noise by construction, and the profile says for which κ.

Which of two near-tied tokens rounding prefers is no matter of its size, but a machine may be biased: of the share of
flips that send the token which the policy likes better twice the odds are forgiven, of the bound that was calibrated.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Final

import msgspec
import numpy as np

from farflung.protocol.numerics import Dtype, Numerics
from farflung.trust.evidence import (
    CEILING,
    CHEATS,
    FAR,
    FAR_FACTOR,
    LIKED,
    TIE,
    Profile,
    Scope,
    Seen,
    Tally,
    check,
    log_ratios,
)
from farflung.trust.watch import Flips, bits, count_flips

EDGES: Final = tuple(round(1e-4 * 2 ** (i / 3), 10) for i in range(52))
"""Inner edges of the gap bins, three to an octave up to 13 nats; the last bin has no end."""
STRIDE: Final = 3
"""Windows grow by a bin up to so many, an octave of `EDGES`, and by so many beyond."""
TOLERANCE = {"float32": 2e-4, "bfloat16": 2e-3, "float16": 2e-3, "fp8": 2e-3}
"""Score noise, in nats at temperature 1, that is forgiven on the best of machines, by arithmetic."""
MARGIN: Final = 3.0
"""How many times the calibrated noise an honest node may have."""


def tally(edges: tuple[float, ...], seen: Iterable[Seen]) -> Tally:
    """Count positions and flips per bin of the gap."""
    size = len(edges) + 1
    positions, flipped = np.zeros((2, size), int)
    for one in seen:
        check(one)
        bins = np.searchsorted(edges, one.gap, side="right")
        positions += np.bincount(bins, minlength=size)
        flipped += np.bincount(bins[np.asarray(one.margin) > TIE], minlength=size)
    return Tally(tuple(positions.tolist()), tuple(flipped.tolist()))


def calibrate(
    name: str,
    honest: Iterable[Seen],
    cheats: Mapping[str, Sequence[Seen]] | None = None,
    *,
    numerics: Numerics,
    verified_in: Sequence[Dtype],
    noise: Sequence[float] | np.ndarray = (),
    edges: tuple[float, ...] = EDGES,
    margin: float = MARGIN,
    tolerance: float = 1e-3,
    floor: float = 1e-4,
    error: float = 1e-3,
    scope: Scope | None = None,
) -> Profile:
    """Make a profile from replays of trusted nodes; `cheats`, by name, only measure what it can tell.

    They generated with these `numerics`, and were replayed in each of `verified_in`.
    `noise` are differences d between the generator's and the verifier's log-probability of tokens that were sent, in
    nats. Each q₀ is exceeded with probability `error`, and is `_floor` if that is higher: machines of a kind that was
    tried may all round alike. `tolerance` is the score noise, in nats, that must be forgiven whatever was seen.
    """
    honest = list(honest)
    seen, worst = tally(edges, honest), max((float(one.margin.max(initial=0.0)) for one in honest), default=0.0)
    size = np.abs(np.asarray(noise, float))
    bounds = bounds_of(edges, seen, size, margin, error)
    floors = (_floor(low, tolerance, floor) for low in (0.0, *edges))
    q0 = tuple(accumulate(map(max, bounds, floors), min, initial=CEILING))[1:]
    scale = float(np.sqrt((size**2).mean())) if len(size) else 0.0
    far = max(FAR, FAR_FACTOR * worst, FAR_FACTOR * 2 * float(size.max(initial=0.0)))
    about = {"verified_in": tuple(verified_in), **numerics.fields}
    profile = Profile(name, edges, q0, seen, far=far, margin=margin, noise=scale, scope=scope, **about)
    profile = msgspec.structs.replace(profile, liked=liked_bound([count_flips(profile, one) for one in honest], error))
    tokens = max(1, seen.tokens)
    profile = msgspec.structs.replace(profile, choice_bits=sum(bits(profile, one) for one in honest) / tokens)
    power = {cheat: growth(profile, samples) for cheat, samples in (cheats or {}).items()}
    return msgspec.structs.replace(profile, power=power)


def bounds_of(
    edges: Sequence[float], seen: Tally, noise: np.ndarray, margin: float, error: float = 1e-3
) -> tuple[float, ...]:
    """For each bin of `edges` a bound on P(Δ/margin) at its lower edge, and so on that of every position in it."""
    counted = seen.edges or tuple(edges)
    share = error / (len(counted) // STRIDE + STRIDE + 1)
    return tuple(
        min(_by_flips(low / margin, counted, seen, share), _by_noise(low / margin, noise, share))
        for low in (0.0, *edges)
    )


def _by_flips(gap: float, edges: Sequence[float], seen: Tally, error: float) -> float:
    """The lowest bound over windows of bins that end at or below a gap; 1 where there is none."""
    last = sum(edge <= gap for edge in edges)
    ends = [*range(min(STRIDE, last)), *range(2 * STRIDE - 1, last, STRIDE)]
    flips, positions = (np.cumsum(part[:last][::-1])[ends] for part in (seen.flips, seen.positions))
    return min((upper_bound(int(x), int(n), error) for x, n in zip(flips, positions, strict=True)), default=1.0)


def _by_noise(gap: float, noise: np.ndarray, error: float) -> float:
    """2·P(|d| > gap/2), bounded; 1 where nothing was measured."""
    return min(1.0, 2 * upper_bound(int((noise > gap / 2).sum()), len(noise), error))


def _floor(gap: float, tolerance: float, least: float) -> float:
    """Flip probability to forgive at a gap: ½ at a tie, falling as s/Δ (a heavy tail of scale s), never below least."""
    return max(tolerance / (gap + 2 * tolerance) if gap < 100 * tolerance else 0.0, least)


def liked_bound(counted: Sequence[Flips], error: float) -> float:
    """The largest share of honest flips that is liked: twice the odds of its bound; 1 where there were no flips."""
    high = upper_bound(sum(one.liked for one in counted), sum(one.flips for one in counted), error)
    return max(LIKED, 2 * high / (1 + high))


def growth(profile: Profile, seen: Sequence[Seen]) -> float:
    """Nats per token by which the best alternative grows on these rollouts, 0 if none does."""
    nats = sum((log_ratios(profile, one) for one in seen), np.zeros(len(CHEATS)))
    return max(0.0, float(nats.max()) / max(1, sum(len(one.gap) for one in seen)))


@lru_cache(maxsize=1 << 14)
def upper_bound(x: int, n: int, error: float) -> float:
    """The Clopper-Pearson upper bound: the q at which P(Binomial(n, q) ≤ x) = error; 1 where there is no data."""
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
