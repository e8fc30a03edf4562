"""Estimates from a score on some tasks: intervals and pass@k. Pure arithmetic, no torch.

Sources: Wilson 1927 for the interval, which stays within 0 and 1 and holds for few tasks; pass@k without bias, Chen et
al. 2021 (arXiv:2107.03374).
"""

from math import comb, sqrt

Z_95 = 1.959964
"""Standard deviations on each side that hold 95 % of a normal distribution."""


def interval(score: float, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Where the true share lies, by 95 %, if `score` of `trials` independent tasks were right; (0, 1) for none."""
    if trials < 1:
        return 0.0, 1.0
    scale = 1 + z * z / trials
    centre = (score + z * z / (2 * trials)) / scale
    half = z * sqrt(score * (1 - score) / trials + z * z / (4 * trials * trials)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that one of k samples is right, estimated from `right` of `samples`. Raises ValueError.

    1 - C(n - c, k) / C(n, k): the share of the ways to choose k of the n samples that have a right one among them.
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be estimated from {right} right of {samples} samples")
    return 1.0 - comb(samples - right, k) / comb(samples, k)
