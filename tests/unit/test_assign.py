"""Who gets what: each rule once, and the order of tasks."""

from collections.abc import Iterable
from itertools import islice

import pytest

from farflung.tasks.assign import (
    Asker,
    AssignSettings,
    NextTask,
    OpenSamples,
    Plan,
    Share,
    Wait,
    assign,
    is_fresh,
    task_order,
)

SECRET = bytes(range(32))
SETTINGS = AssignSettings(group_size=8, lease_rollouts=16, groups_ahead=4)
NODE = Asker(loaded=5, free_slots=16, max_context=100)


def tasks(step: int) -> Iterable[NextTask]:
    return (NextTask(f"t{step}.{i}", 50) for i in range(1000))


def no_tasks(step: int) -> Iterable[NextTask]:
    return ()


def choose(*offers: OpenSamples, node: Asker = NODE, groups: int = 0, next_tasks=tasks, latest: int = 5, **changes):
    settings = AssignSettings(**{name: getattr(SETTINGS, name) for name in SETTINGS.__slots__} | changes)
    return assign(100.0, latest, node, offers, groups, next_tasks, settings)


def offer(group: str, step: int, *samples: int, tokens: int = 50, at: float | None = None) -> OpenSamples:
    return OpenSamples(group, f"task of {group}", step, samples, tokens, at)


def test_an_empty_world_opens_new_groups_to_fill_the_lease() -> None:
    samples = tuple(range(8))
    assert choose() == Plan(5, (), (Share(None, "t5.0", samples), Share(None, "t5.1", samples)))


def test_the_same_inputs_give_the_same_plan() -> None:
    offers = [offer("b", 5, 3, 1), offer("a", 5, 2), offer("c", 4, 0, at=1.0)]
    assert choose(*offers) == choose(*reversed(offers))


def test_open_samples_come_before_new_groups() -> None:
    plan = choose(offer("g", 5, 6, 7))
    assert plan.continued == (Share("g", "task of g", (6, 7)),)
    assert [len(share.samples) for share in plan.opened] == [8, 6]
    assert plan.rollouts == 16


def test_a_sample_open_again_comes_first_even_at_another_step() -> None:
    plan = choose(offer("g", 5, 6, 7), offer("old", 4, 2, at=50.0))
    assert plan.step == 4
    assert plan.continued == (Share("old", "task of old", (2,)),)
    assert plan.opened[0].task == "t4.0"


def test_samples_open_again_at_the_loaded_step_save_a_change_of_weights() -> None:
    assert choose(offer("old", 4, 2, at=50.0), offer("here", 5, 2, at=60.0)).step == 5


def test_the_longest_waiting_sample_comes_first() -> None:
    offers = [offer("late", 5, 0, at=90.0), offer("never", 5, 1), offer("early", 5, 2, at=10.0)]
    plan = choose(*offers, lease_rollouts=2)
    assert [share.group for share in plan.continued] == ["early", "late"]


def test_a_sample_that_may_be_leased_later_is_left_alone() -> None:
    assert choose(offer("g", 5, 1, at=100.5), next_tasks=no_tasks) == Wait(
        "no open sample or unopened task fits a context of 100 tokens"
    )
    assert isinstance(choose(offer("g", 5, 1, at=100.0), next_tasks=no_tasks), Plan)


def test_one_group_in_two_offers_is_one_share() -> None:
    plan = choose(offer("g", 5, 4), offer("g", 5, 1, at=1.0), next_tasks=no_tasks)
    assert plan.continued == (Share("g", "task of g", (1, 4)),)


def test_leftovers_of_an_older_step_are_finished_while_they_are_fresh() -> None:
    assert choose(offer("left", 4, 7)).step == 4
    assert choose(offer("stale", 3, 7)).step == 5


@pytest.mark.parametrize(("loaded", "step"), [(None, 5), (5, 5), (4, 4), (3, 5), (6, 5)])
def test_new_groups_at_the_loaded_step_if_it_is_recent_else_at_the_latest(loaded: int | None, step: int) -> None:
    assert choose(node=Asker(loaded, 16, 100)).step == step


def test_a_fresh_step_beyond_the_lag_gets_no_new_groups() -> None:
    node = Asker(3, 16, 100)
    assert choose(node=node, max_staleness=4).step == 5
    plan = choose(offer("g", 3, 1), node=node, max_staleness=4)
    assert (plan.step, plan.rollouts, plan.opened) == (3, 1, ())


def test_unfinished_groups_elsewhere_when_there_is_nothing_at_home() -> None:
    plan = choose(offer("g", 5, 1, 2), node=Asker(4, 16, 100), groups=4)
    assert plan == Plan(5, (Share("g", "task of g", (1, 2)),), ())


def test_headroom_limits_new_groups() -> None:
    assert len(choose(groups=3).opened) == 1
    assert choose(groups=4) == Wait("4 groups are in progress or wait for the trainer, 4 are wanted")
    assert choose(offer("g", 5, 1), groups=9).opened == ()


def test_work_must_fit_the_context() -> None:
    small = Asker(5, 16, 49)
    assert isinstance(choose(offer("g", 5, 1), node=small), Wait)
    mixed = [NextTask("long", 101), NextTask("short", 100)]
    assert [share.task for share in choose(next_tasks=lambda step: mixed).opened] == ["short"]


@pytest.mark.parametrize(("slots", "rollouts"), [(1, 4), (4, 4), (9, 9), (16, 16), (500, 16)])
def test_free_slots_bound_the_lease_but_for_the_minimum(slots: int, rollouts: int) -> None:
    assert choose(node=Asker(5, slots, 100)).rollouts == rollouts


def test_a_busy_node_waits() -> None:
    assert choose(node=Asker(5, 0, 100)) == Wait("the node has no free slot")


def test_a_run_without_staleness_still_gets_work_at_the_latest_step() -> None:
    assert choose(max_staleness=0).step == 5
    assert [is_fresh(step, 5, 0) for step in (4, 5, 6)] == [False, True, False]
    assert [is_fresh(step, 5, 2) for step in (3, 4, 5)] == [False, True, True]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 16, 17, 100])
def test_the_order_has_every_task_once(count: int) -> None:
    assert sorted(task_order(SECRET, 1, count)) == list(range(count))


def test_the_order_is_fixed_by_secret_step_and_count() -> None:
    assert list(task_order(SECRET, 3, 10)) == [1, 5, 4, 9, 0, 2, 3, 8, 6, 7]
    assert list(task_order(SECRET, 4, 10)) != list(task_order(SECRET, 3, 10))
    assert list(task_order(bytes(32), 3, 10)) != list(task_order(SECRET, 3, 10))


def test_the_order_is_lazy_and_can_be_entered_anywhere() -> None:
    first_two = [next(task_order(SECRET, 3, 10**12, start)) for start in (0, 1)]
    assert list(islice(task_order(SECRET, 3, 10**12), 2)) == first_two
    assert list(task_order(SECRET, 3, 10, start=7)) == [8, 6, 7]
    assert list(task_order(SECRET, 3, 10, start=10)) == []


def test_the_order_looks_shuffled() -> None:
    """Mean |π(i) − i| of a random permutation of n is n / 3."""
    order = list(task_order(SECRET, 0, 200))
    assert sum(abs(place - i) for i, place in enumerate(order)) / 200 == pytest.approx(200 / 3, rel=0.2)
