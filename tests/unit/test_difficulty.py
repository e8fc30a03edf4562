"""The running estimate of a task's difficulty: worked by hand, and bounded whatever comes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farflung.learner.difficulty import WINDOW, Count, add, pass_rate, worth


def test_counts_add_up_until_the_window_is_full() -> None:
    count = add(add(Count(), 16, 4, 160), 16, 12, 320)
    assert (count.tried, count.right, count.tokens) == (32, 16, 480)
    assert pass_rate(count) == pytest.approx(17 / 34)
    assert worth(count) == pytest.approx(1.0)


def test_old_samples_fade() -> None:
    count = add(Count(64, 0, 640), 16, 16, 320)
    # 48 of the 64 old samples are kept, none of them right
    assert (count.tried, count.right, count.tokens) == (64, 16, 800)
    for _ in range(20):
        count = add(count, 16, 16, 320)
    assert pass_rate(count) > 0.95


def test_a_task_that_nobody_tried_is_a_coin() -> None:
    assert (pass_rate(Count()), worth(Count())) == (0.5, 1.0)


def test_numbers_that_no_group_has_are_refused() -> None:
    with pytest.raises(ValueError, match="5 right of 4 samples"):
        add(Count(), 4, 5, 10)


@given(st.lists(st.tuples(st.integers(0, 4096), st.floats(0, 1), st.integers(0, 1 << 30)), max_size=20))
def test_it_stays_within_its_bounds(groups: list[tuple[int, float, int]]) -> None:
    count = Count()
    for tried, share, tokens in groups:
        count = add(count, tried, int(share * tried), tokens)
    assert 0 <= count.right <= count.tried + 1e-9
    assert count.tried <= WINDOW + 1e-9
    assert 0 < pass_rate(count) < 1
    assert 0 < worth(count) <= 1
