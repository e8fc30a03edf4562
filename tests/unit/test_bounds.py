"""Bounds on honest flips hold at every gap, not in the mean of a bin, and up to the stated multiple of the noise."""

import numpy as np
import pytest
from tests.conftest import CPU

from farflung.trust import bounds, evidence
from farflung.trust.evidence import Profile, Scope, Seen, Tally

SCALE = 0.08
"""Of the difference of the two best scores' noise, in nats: bfloat16 against float32 on SmolLM2."""


def honest(rng: np.random.Generator, tokens: int, factor: float = 1.0) -> Seen:
    """Gaussian noise, whose flips crowd at the lower edge of every bin; gaps as a language model's."""
    gap = rng.exponential(1.2, tokens)
    margin = np.where(rng.normal(0, SCALE * factor, tokens) > gap, gap, 0.0)
    return Seen(gap, margin, rng.uniform(0.2, 1, tokens), rng.normal(-1, 1.5, tokens))


def truth(gap: np.ndarray, factor: float) -> np.ndarray:
    """P(a normal number of this scale > gap)."""
    from math import erfc

    return np.array([0.5 * erfc(one / (SCALE * factor * 2**0.5)) for one in gap])


@pytest.fixture(scope="module")
def profile() -> Profile:
    rng = np.random.default_rng(1)
    noise = rng.normal(0, SCALE / 2**0.5, 20_000)
    return bounds.calibrate("gaussian", [honest(rng, 20_000)], noise=noise, tolerance=2e-3, **CPU)


@pytest.mark.parametrize("factor", [1.0, 2.0, 3.0])
def test_the_bound_holds_at_every_gap_up_to_the_margin(profile: Profile, factor: float) -> None:
    gap = np.geomspace(1e-4, 12, 2000)
    q0 = np.array(profile.q0)[np.searchsorted(profile.edges, gap, side="right")]
    assert (q0 >= truth(gap, factor)).all()
    assert profile.margin == 3


def test_a_bins_own_mean_would_bound_nothing_at_its_lower_edge() -> None:
    """Why the bound is read at narrower gaps: 0.034 of the positions at 0.2 flip, 0.0095 of those from 0.2 to 0.5."""
    gap = np.random.default_rng(2).uniform(0.2, 0.5, 10_000)
    assert truth(np.array([0.2]), 1.0)[0] > 3 * truth(gap, 1.0).mean()


@pytest.mark.parametrize("factor", [1.0, 1.5, 2.0, 3.0])
def test_each_alternatives_mean_ratio_is_at_most_one(profile: Profile, factor: float) -> None:
    """E[LR] by the true probabilities of this very noise, position by position: no sampling, so no luck."""
    seen = honest(np.random.default_rng(3), 4000, factor)
    p = truth(seen.gap, factor)
    margin = np.clip(seen.gap, 2 * evidence.TIE, profile.far * 0.99)
    flipped, kept = (
        np.exp(evidence.log_factors(profile, seen._replace(margin=m))) for m in (margin, np.zeros_like(margin))
    )
    assert (p * flipped + (1 - p) * kept).max() <= 1 + 1e-9


def test_more_data_never_loosens_and_no_data_forgives_everything() -> None:
    rng = np.random.default_rng(5)
    small, large = (bounds.calibrate("p", [honest(rng, n)], **CPU) for n in (500, 50_000))
    assert np.mean(large.q0) < np.mean(small.q0)
    assert set(bounds.calibrate("p", [honest(rng, 0)], **CPU).q0) == {evidence.CEILING}


def test_counts_in_coarser_bins_bound_as_well() -> None:
    """A profile whose rollouts are gone is made anew from its counts."""
    counts = Tally((100, 200, 300, 4000), (40, 20, 3, 0), (0.05, 0.1, 0.5))
    found = bounds.bounds_of(bounds.EDGES, counts, np.zeros(0), 1.0)
    at = dict(zip((0.0, *bounds.EDGES), found, strict=True))
    assert at[0.0] == 1
    below = [bound for edge, bound in at.items() if 0.05 <= edge < 0.1]
    assert set(below) == {bounds.upper_bound(40, 100, 1e-3 / 5)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"model": "b" * 64}, "another model"),
        ({"temperature": 0.3}, "temperature 1, the run's is 0.3"),
        ({"tokens": 65}, "completions of up to 64 tokens, the run allows 65"),
        ({"tokens": 8}, ""),
    ],
)
def test_a_profile_says_for_which_runs_it_is(change: dict, words: str) -> None:
    asked = {"model": "a" * 64, "temperature": 1.0, "tokens": 64} | change
    refused = Scope("a" * 64, 1.0, 64).refuses(**asked)
    assert words in refused
    assert bool(words) == bool(refused)
