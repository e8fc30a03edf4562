"""Which groups teach anything: pure functions of rewards, no torch."""

from collections.abc import Sequence


def is_informative(rewards: Sequence[float], tolerance: float = 1e-6) -> bool:
    """Whether rewards differ within the group; where they do not, every advantage is 0 and so is the gradient."""
    return len(rewards) > 1 and max(rewards) - min(rewards) > tolerance


def select(groups: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the groups worth training on, in order, each group given by its rewards."""
    return [index for index, rewards in enumerate(groups) if is_informative(rewards)]


def pass_rate(rewards: Sequence[float], threshold: float = 0.5) -> float:
    """Share of samples whose reward reaches `threshold`; 0 of an empty group."""
    return sum(reward >= threshold for reward in rewards) / max(len(rewards), 1)
