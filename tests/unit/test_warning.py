"""The early warning of collapse: it speaks when entropy and clipping rise, and not for noise or for one of them."""

import random

from farflung.learner.warning import WINDOW, Sign, warn


def history(entropy: float, clip: float, *, steps: int = 2 * WINDOW, noise: float = 0.03) -> list[Sign]:
    """A run whose entropy and clip share grow linearly by these factors over its length."""
    rng = random.Random(4)

    def at(factor: float, k: int) -> float:
        return (1 + (factor - 1) * k / steps) * (1 + rng.gauss(0, noise))

    return [Sign(entropy=0.4 * at(entropy, k), clip_fraction=0.01 * at(clip, k)) for k in range(steps)]


def test_a_rising_entropy_with_creeping_clips_is_named() -> None:
    said = warn(history(2.0, 4.0))
    assert "entropy rose from 0." in said
    assert "farflung rollback" in said


def test_a_healthy_run_is_left_alone() -> None:
    assert warn(history(1.0, 1.0, noise=0.3)) == ""
    assert warn(history(0.5, 4.0)) == ""
    assert warn(history(2.0, 1.0)) == ""
    assert warn(history(2.0, 4.0, steps=WINDOW)) == ""


def test_noise_alone_is_no_rise() -> None:
    assert warn(history(1.3, 1.3, noise=3.0)) == ""


def test_without_clipping_entropy_decides() -> None:
    assert "clipped" not in warn(history(2.0, 1.0)[:0] + [Sign(s.entropy, 0.0) for s in history(2.0, 1.0)])
    assert warn([Sign(s.entropy, 0.0) for s in history(2.0, 1.0)])
