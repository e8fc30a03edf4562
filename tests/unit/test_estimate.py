"""Intervals and pass@k against counted values."""

import random
from itertools import combinations

import pytest

from farflung.learner.estimate import interval, pass_at_k


def test_wilsons_interval_by_hand() -> None:
    assert interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert interval(0.3, 0) == (0.0, 1.0)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = random.Random(1)
    held = 0
    for _ in range(1000):
        low, high = interval(sum(rng.random() < 0.3 for _ in range(60)) / 60, 60)
        held += low <= 0.3 <= high
    assert 0.92 < held / 1000 < 0.98


@pytest.mark.parametrize(("samples", "right", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 2), (6, 1, 6)])
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(samples: int, right: int, k: int) -> None:
    chosen = list(combinations(range(samples), k))
    expected = sum(any(one < right for one in some) for some in chosen) / len(chosen)
    assert pass_at_k(samples, right, k) == pytest.approx(expected)


def test_pass_at_more_than_there_are_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="pass@3"):
        pass_at_k(2, 1, 3)
