"""Difficulty of a task at present: a running count of answers and of right ones. Pure, no torch.

Old samples fade, for the policy that gave them is gone: the counts never stand for more than `WINDOW` samples.
"""

from dataclasses import dataclass
from typing import Any

WINDOW = 64.0
"""Samples that the counts of a task stand for at most."""
HALF_LIFE = 32.0
"""Steps of the policy after which a count stands for half as many samples."""
RIGHT = 0.99
"""Reward from which an answer counts as right: environments may give part of it for part of an answer."""


@dataclass(frozen=True, slots=True)
class Count:
    """The count of one task's tries; `right` and `tokens` are out of `tried` samples, faded alike."""

    tried: float = 0.0
    right: float = 0.0
    tokens: float = 0.0


def add(count: Count, tried: int, right: float, tokens: int) -> Count:
    """The count with some samples more. Raises ValueError for numbers that no group has."""
    if not 0 <= right <= tried or tokens < 0:
        raise ValueError(f"{right} right of {tried} samples with {tokens} tokens: no group has that")
    if not tried:
        return count
    kept = min(1.0, max(0.0, WINDOW - tried) / count.tried) if count.tried else 0.0
    whole = Count(kept * count.tried + tried, kept * count.right + right, kept * count.tokens + tokens)
    share = min(1.0, WINDOW / whole.tried)  # a group larger than the window
    return Count(share * whole.tried, share * whole.right, share * whole.tokens)


def fade(steps: Any) -> Any:
    """The share of a count that is left so many steps of the policy later; of an array of steps, an array."""
    return 0.5 ** (steps / HALF_LIFE)


def faded(count: Count, steps: float) -> Count:
    """The count as it stands so many steps of the policy later."""
    kept = fade(steps)
    return Count(kept * count.tried, kept * count.right, kept * count.tokens)


def pass_rate(count: Count) -> float:
    """The chance that a sample is right, in (0, 1): the mean of the posterior of a uniform prior (Laplace)."""
    return (count.right + 1.0) / (count.tried + 2.0)


def worth(count: Count) -> float:
    """How much a group of this task has to teach, in (0, 1]: 4 p (1 - p), the reward's variance over its largest."""
    rate = pass_rate(count)
    return 4.0 * rate * (1.0 - rate)
