"""Diagnosis of a suspect's tokens: the explanation under which they would be honest. Pure; no torch.

Every explanation has the likelihood of what was seen; the best one is named if it is likelier by a factor of `FACTOR`
than the lease *and than every other explanation*, and leaves nothing odd. Where two explain the same rollouts about as
well, none is named: one flip in twenty tokens may be another temperature as well as other noise.

**By replay.** A validator replays the rollouts as if computed otherwise: other weights, another temperature. Under the
true explanation the flips vanish but for near-ties, as the profile's honest flip probabilities q₀(Δ) have it.

**Without one**, from gap, margin and π of the replay as leased:
- *other noise*: a sampler of the same policy with other noise sends the seeded pick with probability π and another
  token else, whatever the gap. It leaves nothing odd if the likelihood is what such a sampler would have: fabricated
  text flips where the policy is sure.
- *noisier arithmetic*: score noise k times that of the profile flips a gap Δ as often as the profile flips Δ/k, and a
  flip is far from k times `far` on. It is a machine and no cheat's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from farflung.trust.evidence import (
    Profile,
    Seen,
    check,
    flips,
    honest_odds,
    log_ratios,
    mean_log_ratio,
    submission_log_ratios,
)

FACTOR: Final = 1000.0
LEAST_TOKENS: Final = 8
AS_LEASED: Final = "as leased"
"""The name under which the rollouts of all explanations come as the lease has them."""
UNSEEDED: Final = "other noise (unseeded)"
NOISE: Final = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)
"""Multiples of the profile's score noise that are tried."""
SURPRISE: Final = 4.0
"""Standard deviations by which a likelihood may stay below what its model expects."""
SURE: Final = 1 - 1e-6
"""No policy is taken to be surer of its pick."""


class Fit(NamedTuple):
    """How well something explains the rollouts, and whether that leaves nothing odd, which is asked of the best."""

    log_likelihood: float
    is_clean: Callable[[], bool]


def log_likelihood(profile: Profile, seen: Sequence[Seen]) -> float:
    """ln P(these flips | honest arithmetic of this profile), over all positions. Raises ValueError for odd numbers."""
    one = joined(seen)
    check(one)
    near, far, is_near, is_far = honest_odds(profile, one)
    return float(np.where(is_far, np.log(far), np.where(is_near, np.log(near), np.log1p(-near - far))).sum())


def joined(seen: Sequence[Seen]) -> Seen:
    """The positions of all rollouts, one after the other."""
    return Seen(*(np.concatenate(part) for part in zip(*seen, strict=True)))


def scaled(seen: Seen, noise: float) -> Seen:
    """A replay's view, in units of a machine whose score noise is so many times the profile's."""
    return Seen(np.asarray(seen.gap) / noise, np.asarray(seen.margin) / noise, seen.pick, np.asarray(seen.lead) / noise)


def diagnose(profile: Profile, leased: Sequence[Seen], explanations: Mapping[str, Sequence[Seen]]) -> str:
    """The name of the explanation that fits by far better than the lease and all others, or nothing."""
    if not explanations or sum(len(one.gap) for one in leased) < LEAST_TOKENS or not any(map(flips, leased)):
        return ""
    fits = {name: _fit(profile, seen) for name, seen in explanations.items()}
    fits |= {UNSEEDED: _unseeded(profile, leased)} | _noisier(profile, leased)
    best = max(fits, key=lambda name: fits[name].log_likelihood)
    others = [fit.log_likelihood for name, fit in fits.items() if name != best]
    ahead = fits[best].log_likelihood - max(log_likelihood(profile, leased), *others)
    return best if ahead >= math.log(FACTOR) and fits[best].is_clean() else ""


def _fit(profile: Profile, seen: Sequence[Seen]) -> Fit:
    """Of honest arithmetic; clean if no cheat explains the rest: else the best of several wrong ones would be named."""

    def is_clean() -> bool:
        return mean_log_ratio(submission_log_ratios([log_ratios(profile, one) for one in seen])) <= 0

    return Fit(log_likelihood(profile, seen), is_clean)


def _noisier(profile: Profile, leased: Sequence[Seen]) -> dict[str, Fit]:
    """The multiple of the profile's noise that fits best, by its name."""
    fits = {noise: _fit(profile, [scaled(one, noise) for one in leased]) for noise in NOISE}
    best = max(fits, key=lambda noise: fits[noise].log_likelihood)
    return {f"noisier arithmetic (about {best * profile.margin:g} times the profile's)": fits[best]}


def _unseeded(profile: Profile, leased: Sequence[Seen]) -> Fit:
    """Of a sampler with noise of its own; a flip is near or far with even odds, as the alternatives have it."""
    gap, margin, pick, lead = joined(leased)
    pick = np.minimum(pick.astype(float), SURE)
    _, _, is_near, is_far = honest_odds(profile, Seen(gap, margin, pick, lead))
    kept, other = np.log(pick), np.log((1 - pick) / 2)
    found = float(np.where(is_near | is_far, other, kept).sum())
    expected = float((pick * kept + (1 - pick) * other).sum())
    spread = math.sqrt(float((pick * (1 - pick) * (kept - other) ** 2).sum()))
    return Fit(found, lambda: found >= expected - SURPRISE * max(spread, 1.0))
