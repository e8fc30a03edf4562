"""Filters for the groups that teach anything: pure functions of rewards, no torch."""

from collections.abc import Sequence


def is_informative(rewards: Sequence[float], tolerance: float = 1e-6) -> bool:
    """Whether rewards differ within the group; where they do not, every advantage is 0 and so is the gradient."""
    return len(rewards) > 1 and max(rewards) - min(rewards) > tolerance
