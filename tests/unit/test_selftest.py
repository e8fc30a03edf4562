"""How a machine's noise is told from what it generates: pure arithmetic."""

import msgspec
import numpy as np
import pytest
from tests.conftest import FP32

from farflung.trust.evidence import Profile, Seen, Tally
from farflung.trust.machine_noise import BEYOND, GRID, compared, expectation, noise_factor

EDGES = (0.001, 0.01, 0.1, 0.5, 1.0)
PROFILE = Profile("p", EDGES, (0.5, 0.2, 0.05, 0.002, 1e-4, 1e-4), Tally((1,) * 6, (0,) * 6), **FP32)
"""Of a machine with score noise of some 0.01 nats."""


def machine(noise: float, tokens: int = 300, seed: int = 0) -> list[Seen]:
    """What a self-test sees of a machine whose scores are off by so many nats."""
    rng = np.random.default_rng(seed)
    gap = rng.exponential(1.0, tokens)
    off = rng.normal(0, noise, tokens)
    return [Seen(gap, np.where(off > gap, gap, 0.0), np.full(tokens, 0.9), np.zeros(tokens))]


def test_no_flips_are_the_least_noise() -> None:
    assert noise_factor(PROFILE, machine(0.0)) == GRID[0]
    assert noise_factor(PROFILE, []) == GRID[0]


def test_noise_beyond_the_profile_is_measured() -> None:
    quiet, loud, broken = (
        float(np.median([noise_factor(PROFILE, machine(noise, seed=seed)) for seed in range(9)]))
        for noise in (0.01, 0.3, 3.0)
    )
    assert quiet <= 1
    assert 3 < loud < broken
    assert quiet < loud


def test_text_of_another_model_is_beyond_all_noise() -> None:
    gap = np.full(200, 9.0)
    assert noise_factor(PROFILE, [Seen(gap, gap, np.full(200, 0.99), np.zeros(200))]) == BEYOND


def test_it_rises_with_the_flips() -> None:
    gap, found = np.linspace(0.01, 3, 300), []
    for flips in (0, 2, 8, 32, 128):
        margin = np.where(np.arange(300) < flips, gap, 0.0)
        found.append(noise_factor(PROFILE, [Seen(gap, margin, np.full(300, 0.9), np.zeros(300))]))
    assert found == sorted(found)
    assert found[0] < found[-1]


@pytest.mark.parametrize(
    ("own", "known", "margin"),
    [
        ([5, 6, 7], [5, 6, 7], [0, 0, 0]),
        ([5, 9, 9], [5, 6, 7], [0, 2]),
        ([9, 6, 7], [5, 6, 7], [1]),
        ([5, 6], [5, 6, 7], [0, 0, 3]),
        ([5, 6, 7, 8], [5, 6, 7], [0, 0, 0]),
        ([], [5, 6, 7], [1]),
    ],
)
def test_two_texts_are_compared_as_long_as_their_contexts_are_one(own, known, margin) -> None:
    seen = compared(own, known, np.array([1.0, 2.0, 3.0]), np.full(3, 0.5))
    assert seen.margin.tolist() == margin
    assert len(seen.gap) == len(seen.pick) == len(margin)


def test_what_to_expect_is_one_sentence() -> None:
    wide = msgspec.structs.replace(PROFILE, margin=3.0)
    told = "this machine's noise is at most 0.25× that of profile p: its work will pass, up to 3× is forgiven"
    assert expectation(0.25, wide) == told
    assert "about 2× that of profile p: its work will pass" in expectation(2.0, wide)
    assert "would be ejected" in expectation(2.0, PROFILE)
    assert "would be ejected" in expectation(4.0, wide)
    assert "--profile" in expectation(BEYOND, wide)
    assert "more than 64×" in expectation(BEYOND, wide)


def test_the_multiple_is_that_of_the_calibrated_noise() -> None:
    """Bounds that forgive three times the noise are those of a machine three times as noisy."""
    wide = msgspec.structs.replace(PROFILE, margin=3.0)
    assert noise_factor(wide, machine(0.3)) == pytest.approx(3 * noise_factor(PROFILE, machine(0.3)), rel=0.34)
