"""Figures of a run that need no database."""

import pytest

from farflung.ops.summary import first_and_last


def test_a_run_begins_and_ends_with_the_mean_of_five_steps():
    rewards = [0.1, 0.2, 0.3, 0.4, 0.5, 9.0, 9.0, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert first_and_last(rewards) == (pytest.approx(0.3), pytest.approx(0.8))


@pytest.mark.parametrize(
    ("rewards", "found"),
    [([], (None, None)), ([0.4], (0.4, 0.4)), ([0.1, 0.3, 0.8], (0.1, 0.8)), ([0.0, 0.2, 0.4, 0.8], (0.1, 0.6))],
)
def test_a_short_run_is_cut_in_halves(rewards, found):
    first, last = first_and_last(rewards)
    assert (first, last) == (pytest.approx(found[0]), pytest.approx(found[1]))
