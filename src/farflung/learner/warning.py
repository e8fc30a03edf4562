"""An early warning of the known collapse: entropy that rises and a clip share that creeps, long before reward falls.

INTELLECT-2 (arXiv:2505.07291) saw every ablation end so: after some 150 steps entropy turned upwards, clipping became
more frequent, and the run was lost in the end. Pure functions of the history.
"""

from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 20
"""Steps on each side of the comparison."""
ENTROPY_RISE = 0.2
CLIP_RISE = 0.5
SIGMAS = 3.0
"""How many standard errors of its steps' scatter a rise must stand out by."""


@dataclass(frozen=True, slots=True)
class Sign:
    """A step's signs of the policy's health."""

    entropy: float
    clip_fraction: float


def warn(history: Sequence[Sign], window: int = WINDOW) -> str:
    """A sentence if entropy rose from one window of steps to the next and clipping with it, else nothing.

    A run with one optimizer update per step clips nothing, so there entropy decides alone.
    """
    if len(history) < 2 * window:
        return ""
    before, after = history[-2 * window : -window], history[-window:]
    entropy = [_pair(part, "entropy") for part in (before, after)]
    clip = [_pair(part, "clip_fraction") for part in (before, after)]
    is_clipping = any(share for share, _ in clip)
    if not _rose(entropy, ENTROPY_RISE) or (is_clipping and not _rose(clip, CLIP_RISE)):
        return ""
    clipped = f" and clipped tokens from {clip[0][0]:.2%} to {clip[1][0]:.2%}" if is_clipping else ""
    return (
        f"entropy rose from {entropy[0][0]:.2f} to {entropy[1][0]:.2f} nats{clipped} within {2 * window} steps, as "
        "before a collapse: lower learn.lr, or go back with `farflung rollback`"
    )


def _pair(part: Sequence[Sign], name: str) -> tuple[float, float]:
    """Mean and standard error of the mean."""
    values = [float(getattr(sign, name)) for sign in part]
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return mean, (spread / len(values)) ** 0.5


def _rose(pair: Sequence[tuple[float, float]], share: float) -> bool:
    (before, error), (after, other) = pair
    return after > before * (1 + share) and after - before > SIGMAS * (error**2 + other**2) ** 0.5
