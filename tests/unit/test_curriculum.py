"""Which tasks are drawn: worth before chance, nobody starved, the same from the same."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farflung.learner.difficulty import HALF_LIFE, Count, faded
from farflung.protocol.seeds import SECRET_BYTES
from farflung.tasks.assign import task_order
from farflung.tasks.curriculum import EXPLORE, POOLS, Candidate, draw, pool_of

SECRET = bytes(range(SECRET_BYTES))
NEVER, HALF, ALWAYS = Count(64, 0), Count(64, 32), Count(64, 64)


def shuffled(tasks: list[Candidate], step: int, most: int) -> list[Candidate]:
    return [tasks[place] for place in itertools.islice(task_order(SECRET, step, len(tasks)), most)]


def drawn(tasks: list[Candidate], step: int, places: int):
    seen = [task for task in tasks if task.seen_step >= 0]
    return draw(SECRET, step, places, seen, shuffled(tasks, step, places))


COUNTS = st.integers(0, 64).flatmap(lambda n: st.builds(Count, st.just(n), st.floats(0, n), st.just(10 * n)))
TASKS = st.lists(st.tuples(COUNTS, st.integers(-1, 50)), max_size=60).map(
    lambda found: [Candidate(place, count, seen) for place, (count, seen) in enumerate(found)]
)


@given(TASKS, st.integers(51, 500), st.integers(1, 80))
def test_each_task_comes_once_and_as_many_as_there_are_places_for(tasks: list[Candidate], step: int, places: int):
    found = drawn(tasks, step, places)
    positions = [one.position for one in found]
    assert len(set(positions)) == len(positions) <= min(places, len(tasks))
    assert set(positions) <= set(range(len(tasks)))
    assert len(positions) >= min(places, len(tasks)) * (EXPLORE - 1) // EXPLORE - 1
    for one in found:
        assert one.pool == pool_of(tasks[one.position].count)
        assert 0 < one.rate < 1
        assert one.draw == -1 or 0 <= one.draw <= 1


@given(TASKS, st.integers(51, 500))
def test_the_same_history_and_secret_draw_the_same_tasks(tasks: list[Candidate], step: int):
    assert drawn(tasks, step, 16) == drawn(tasks, step, 16)


def test_another_secret_or_step_draws_others() -> None:
    tasks = [Candidate(place, HALF, 3) for place in range(50)]
    first = draw(SECRET, 4, 10, tasks, tasks[:10])
    assert first != draw(SECRET, 5, 10, tasks, tasks[:10])
    assert first != draw(bytes(SECRET_BYTES), 4, 10, tasks, tasks[:10])


def test_what_is_sometimes_right_comes_first() -> None:
    tasks = [Candidate(place, (NEVER, HALF, ALWAYS)[place % 3], 9) for place in range(90)]
    found = [one for one in drawn(tasks, 10, 16) if one.draw >= 0]
    assert {one.pool for one in found} == {"sometimes"}
    assert all(0.2 < one.draw < 0.8 for one in found)


def test_tasks_that_were_never_tried_are_explored_beside_known_ones() -> None:
    """And do not crowd them out: as many of them are candidates as there are places."""
    known = [Candidate(place, HALF, 9) for place in range(100)]
    tasks = known + [Candidate(place, Count(), -1) for place in range(100, 10_000)]
    pools = [one.pool for step in range(10, 30) for one in drawn(tasks, step, 32)]
    assert 0.05 < pools.count("unseen") / len(pools) < 0.6


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000))
def test_no_task_is_starved(begin: int) -> None:
    """However hopeless, each comes among the first places of some step, about as often as the explored places allow."""
    tasks = [Candidate(place, NEVER if place < 30 else HALF, begin) for place in range(60)]
    steps = 60 * EXPLORE
    found = {one.position for step in range(begin, begin + steps) for one in drawn(tasks, step, 60)[:EXPLORE]}
    assert found == set(range(60))


def test_old_counts_fade_to_the_prior() -> None:
    assert faded(Count(64, 32, 640), HALF_LIFE) == Count(32, 16, 320)
    hopeless = [Candidate(0, NEVER, 0), *(Candidate(place, HALF, 0) for place in range(1, 9))]
    rates = [next(one.rate for one in drawn(hopeless, step, 9) if one.position == 0) for step in (1, 100, 1000)]
    assert rates == sorted(rates)
    assert rates[0] < 0.01
    assert rates[2] == pytest.approx(0.5, abs=0.01)


def test_nothing_is_drawn_from_nothing() -> None:
    assert draw(SECRET, 1, 8, [], []) == []


@pytest.mark.parametrize(
    ("right", "pool"), [(0, "never"), (3, "rarely"), (8, "sometimes"), (13, "mostly"), (16, "always")]
)
def test_pools_by_pass_rate(right: int, pool: str) -> None:
    assert pool_of(Count(16, right)) == pool
    assert pool_of(Count()) == "unseen"
    assert {pool, "unseen"} <= set(POOLS)
