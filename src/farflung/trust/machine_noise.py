"""Noise of a machine's arithmetic, in multiples of the noise that its profile was calibrated on. Pure; no torch.

A node generates what trusted machines generated before, from the same seeds. Where its tokens differ its scores did,
by more than the gap there. The factor k is the least by which the profile's noise must be multiplied so that so many
flips are no surprise: score noise k times as large flips a gap Δ as often as the profile's own flips Δ/k.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from farflung.trust.bounds import TOLERANCE
from farflung.trust.evidence import Profile, Seen, check, honest_odds

GRID: Final = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)
BEYOND: Final = 128.0
"""The multiple reported where none of the grid explains the flips."""
RARE: Final = 1e-3
"""A number of flips that comes with less than this probability is a surprise."""


def compared(own: Sequence[int], known: Sequence[int], gap: np.ndarray, pick: np.ndarray) -> Seen:
    """A generation beside the known one, up to the first token that differs: beyond it the contexts do."""
    same = next((i for i, pair in enumerate(zip(own, known, strict=False)) if pair[0] != pair[1]), None)
    if same is None:
        same = min(len(own), len(known)) - (len(own) == len(known))  # one that ends early differs where it ends
    size = min(same + 1, len(known))
    margin = np.zeros(size)
    if list(own[:size]) != list(known[:size]):
        margin[-1] = gap[size - 1]
    return Seen(np.asarray(gap[:size]), margin, np.asarray(pick[:size]), np.zeros(size))


def noise_factor(profile: Profile, seen: Sequence[Seen]) -> float:
    """The least multiple of the calibrated noise that explains these flips; a profile forgives up to its margin."""
    return next((k for k in GRID if _is_explained(profile, seen, k / profile.margin)), BEYOND)


def scale_of(apart: Sequence[np.ndarray]) -> float:
    """Standard deviation of differences of log-probabilities, in nats, by the nine tenths that are smallest: those of
    unlikely tokens may be far off and matter to no pick. 0 where none is known.
    """
    known = [np.abs(one[np.isfinite(one)]) for one in apart]
    found = np.concatenate(known) if known else np.empty(0)
    return float(np.quantile(found, 0.9)) / 1.645 if len(found) else 0.0


def calibrated_noise(profile: Profile) -> float:
    """What a profile was calibrated to forgive `margin` times: the noise seen, or what is forgiven the best machine."""
    temperature = profile.scope.temperature if profile.scope else 1.0
    return max(profile.noise, TOLERANCE[profile.arithmetic] / temperature)


def _is_explained(profile: Profile, seen: Sequence[Seen], k: float) -> bool:
    odds: list[np.ndarray] = []
    found = 0
    for one in seen:
        check(one)
        near, far, is_near, is_far = honest_odds(profile, one._replace(gap=one.gap / k, margin=one.margin / k))
        odds.append(near + far)
        found += int((is_near | is_far).sum())
    return not odds or _at_least(np.concatenate(odds), found) >= RARE


def _at_least(odds: np.ndarray, count: int) -> float:
    """P(at least `count` of independent events with these probabilities), by adding one event after the other."""
    below = np.zeros(count)
    if count == 0:
        return 1.0
    below[0] = 1.0
    for p in odds:
        below[1:] = below[1:] * (1 - p) + below[:-1] * p
        below[0] *= 1 - p
    return 1.0 - float(below.sum())


def expectation(factor: float, profile: Profile) -> str:
    """The prospects of a machine with such noise."""
    text = f"this machine's noise is {_times(factor)} that of profile {profile.name}: "
    if factor <= profile.margin:
        return text + f"its work will pass, up to {profile.margin:g}× is forgiven"
    held = "its engine may hold other weights than the run's; " if factor >= BEYOND else ""
    return text + f"it would be ejected, honest or not; {held}choose another --profile, or float32"


def _times(factor: float) -> str:
    if factor >= BEYOND:
        return f"more than {GRID[-1]:g}×"
    return f"at most {factor:g}×" if factor <= GRID[0] else f"about {factor:g}×"
