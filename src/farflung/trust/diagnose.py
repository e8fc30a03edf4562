"""Why a suspect's tokens are not what was leased: the explanation under which they are honest. Pure; no torch.

A validator replays the same rollouts under each explanation (other weights, another temperature). Under the true one
the flips vanish but for near-ties. Each explanation has the likelihood of what was seen, as the profile's honest flip
probabilities q₀(Δ) give it; the best one is named if it is likelier than the lease itself by a factor of `FACTOR` and
leaves nothing that looks like a cheat's.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from farflung.trust.evidence import (
    Profile,
    Seen,
    check,
    honest_odds,
    log_ratios,
    mean_log_ratio,
    submission_log_ratios,
)

FACTOR: Final = 1000.0
LEAST_TOKENS: Final = 8


def log_likelihood(profile: Profile, seen: Sequence[Seen]) -> float:
    """ln P(these flips | honest arithmetic of this profile), over all positions. Raises ValueError for odd numbers."""
    total = 0.0
    for one in seen:
        check(one)
        near, far, is_near, is_far = honest_odds(profile, one)
        found = np.where(is_far, np.log(far), np.where(is_near, np.log(near), np.log1p(-near - far)))
        total += float(found.sum())
    return total


def diagnose(profile: Profile, leased: Sequence[Seen], explanations: Mapping[str, Sequence[Seen]]) -> str:
    """The name of the explanation that fits by far better than the lease, or nothing."""
    if not explanations or sum(len(one.gap) for one in leased) < LEAST_TOKENS:
        return ""
    fits = {name: log_likelihood(profile, seen) for name, seen in explanations.items()}
    best = max(fits, key=lambda name: fits[name])
    is_better = fits[best] - log_likelihood(profile, leased) >= math.log(FACTOR)
    return best if is_better and _looks_honest(profile, explanations[best]) else ""


def _looks_honest(profile: Profile, seen: Sequence[Seen]) -> bool:
    """Whether nothing is left to explain: else the best of several wrong explanations would be named."""
    return mean_log_ratio(submission_log_ratios([log_ratios(profile, one) for one in seen])) <= 0
