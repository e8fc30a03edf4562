"""Several nodes take their parts of the same open work, one after the other."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from farflung.tasks.allocator import Allocator
from farflung.tasks.assign import Asker, AssignSettings, NextTask, OpenSamples, Plan, Wait, assign

SETTINGS = AssignSettings(lease_rollouts=4, lease_minimum=1, group_size=6, groups_ahead=5)


def tasks_at(step: int):
    return (NextTask(f"t{step}-{number}", 10) for number in range(20))


def allocator(*open_samples: OpenSamples, groups_now: int = 0) -> Allocator:
    ids = (f"new{number}" for number in itertools.count())
    return Allocator(3, open_samples, groups_now, tasks_at, lambda: next(ids), SETTINGS)


def test_the_next_node_goes_on_with_the_group_that_the_one_before_opened() -> None:
    work = allocator()
    plans = [work.take(Asker(3, 4, 100), 0.0) for _ in range(3)]
    taken = [[(share.group, share.samples) for share in plan.shares] for plan in plans if isinstance(plan, Plan)]
    first, second = ("new0", (0, 1, 2, 3)), ("new0", (4, 5))
    assert taken == [[first], [second, ("new1", (0, 1))], [("new1", (2, 3, 4, 5))]]


def test_samples_that_came_open_again_are_given_once() -> None:
    work = allocator(OpenSamples("g", "t", 3, (0,), 10, 1.0), OpenSamples("g", "t", 3, (4, 5), 10), groups_now=5)
    plan = work.take(Asker(3, 4, 100), 2.0)
    assert isinstance(plan, Plan)
    assert [(share.group, share.samples) for share in plan.shares] == [("g", (0, 4, 5))]
    assert isinstance(work.take(Asker(3, 4, 100), 2.0), Wait)


@given(st.lists(st.tuples(st.sampled_from([None, 2, 3]), st.integers(1, 9)), max_size=14), st.integers(0, 5))
def test_a_set_is_given_what_one_after_the_other_would_be(asking, groups_now) -> None:
    """The books are kept here by hand, as if the database were read anew for each."""
    work, opened, free = allocator(groups_now=groups_now), dict[str, tuple[str, int]](), dict[str, set[int]]()
    for loaded, slots in asking:
        offers = [OpenSamples(g, *opened[g], tuple(sorted(left)), 10) for g, left in free.items() if left]

        def left(step: int):
            return (task for task in tasks_at(step) if (task.task, step) not in opened.values())

        asker = Asker(loaded, slots, 100)
        expected = assign(0.0, 3, asker, offers, groups_now + len(opened), left, SETTINGS)
        found = work.take(asker, 0.0)
        if isinstance(expected, Wait):
            assert found == expected
            continue
        assert isinstance(found, Plan)
        assert (found.step, found.continued) == (expected.step, expected.continued)
        assert [(s.task, s.samples) for s in found.opened] == [(s.task, s.samples) for s in expected.opened]
        for share in found.opened:
            opened[str(share.group)] = share.task, found.step
            free[str(share.group)] = set(range(SETTINGS.group_size))
        for share in found.shares:
            assert set(share.samples) <= free[str(share.group)]
            free[str(share.group)] -= set(share.samples)
