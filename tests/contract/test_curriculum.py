"""The curriculum in the coordinator: what steps took is remembered, tasks are drawn, equal rewards replaced."""

import json
from itertools import islice

import pytest
import sqlalchemy as sa
from tests.conftest import SAMPLES

from farflung.protocol.states import REOPENING
from farflung.store.tables import GROUPS, NODES, ROLLOUTS, STEPS, TASKS
from farflung.tasks.assign import task_order
from farflung.tasks.draw import drawn_for


async def drawn(house, step):
    return await house.ctx.database.read(lambda c: drawn_for(c, house.ctx.run_ctx, step))


def position_of(house, group):
    query = sa.select(TASKS.c.position).join(GROUPS, GROUPS.c.task == TASKS.c.task).where(GROUPS.c.group == group)
    return house.rows(query)[0][0]


def by_task(house, alike=frozenset()):
    """A reward by task: all right where the task is one of these, else every second sample."""
    query = sa.select(ROLLOUTS.c.rollout, ROLLOUTS.c.sample, GROUPS.c.task)
    rows = {row.rollout: row for row in house.rows(query.join(GROUPS, GROUPS.c.group == ROLLOUTS.c.group))}
    return lambda rollout: 1.0 if rows[rollout].task in alike else float(rows[rollout].sample % 2)


async def do_step(house, step, alike=frozenset()):
    """Work until a step is ready, then commit it."""
    while (batch := await house.claim_step(step)) is None:
        if (lease := await house.ask("ada")) is not None:
            await house.submit("ada", lease)
        await house.audit()
        await house.score(by_task(house, alike))
    await house.commit(batch)
    return batch


def opened(house, step):
    """Positions of the tasks opened at a policy, in the order in which they were."""
    query = sa.select(TASKS.c.position).join(GROUPS, GROUPS.c.task == TASKS.c.task)
    rows = house.rows(query.where(GROUPS.c.step == step, GROUPS.c.purpose == "train").order_by(sa.text("opened_at")))
    return [row[0] for row in rows]


def test_what_a_step_took_is_remembered_and_the_next_tasks_are_drawn(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        first = await drawn(house, 0)
        assert {one.pool for one in first} == {"unseen"}
        assert len({one.position for one in first}) == len(first) > house.config.learn.groups
        batch = await do_step(house, 1)
        assert set(opened(house, 0)) <= {one.position for one in first}
        rows = house.rows(sa.select(TASKS).where(TASKS.c.seen_step == 1))
        assert {row.position for row in rows} == {position_of(house, group.group) for group in batch.groups}
        assert [(row.tried, row.right) for row in rows] == [(SAMPLES, SAMPLES / 2)] * len(batch.groups)
        by_worth = {one.position for one in await drawn(house, 1) if one.draw >= 0}
        assert by_worth, "the next policy has tasks"
        assert not by_worth & {row.position for row in rows}, "those that were just taken rest"

    house.run(scenario)


def test_a_draw_is_a_function_of_the_steps_before(make_house) -> None:
    """Two coordinators of the same run, whose nodes worked otherwise, draw the same; so does one that starts again."""
    found = []

    async def scenario(house, names) -> None:
        await house.step(0)
        for step in (1, 2):
            for _ in range(house.config.lockstep_groups(step - 1) if step > 1 else 2):
                for name in names:
                    if (lease := await house.ask(name)) is not None:
                        await house.submit(name, lease)
                await house.audit()
                await house.score(by_task(house))
            await house.step(step)
            house.ctx.run_ctx.task_orders.clear()
        found.append([await drawn(house, step) for step in range(3)])

    lockstep = {"groups": 2, "lockstep": True, "max_staleness": 0}
    for names in (["ada"], ["bob", "ada"]):
        make_house(learn=lockstep).run(lambda house, names=names: scenario(house, names))
    assert found[0] == found[1]
    assert found[0][1] != found[0][2]


@pytest.mark.parametrize("lockstep", [False, True])
def test_a_group_without_variance_is_replaced(make_house, lockstep) -> None:
    house = make_house(learn={"groups": 2, "lockstep": lockstep, "max_staleness": 0}, lease={"ahead": 1.0})

    async def scenario(house) -> None:
        await house.step(0)
        run_ctx = house.ctx.run_ctx
        alike = {run_ctx.tasks[one.position][0] for one in (await drawn(house, 0))[:3]}
        batch = await do_step(house, 1, alike)
        assert len(batch.groups) == 2, "as many as a step wants"
        assert len(opened(house, 0)) == 5
        if lockstep:
            kept = {row.task: row for row in house.rows(sa.select(TASKS).where(TASKS.c.seen_step == 1))}
            assert len(kept) == batch.seen_groups == 5
            assert {task for task, row in kept.items() if row.right == row.tried} == alike

    house.run(scenario)


@pytest.mark.parametrize("lockstep", [False, True])
def test_a_step_closes_with_fewer_where_hardly_anything_has_variance(make_house, lockstep) -> None:
    learn = {"groups": 2, "lockstep": lockstep, "max_staleness": 1, "oversample": 3.0}
    house = make_house(learn=learn, run={"steps": 9}, lease={"ahead": 1.0})

    async def scenario(house) -> None:
        await house.step(0)
        every = {task for task, _ in house.ctx.run_ctx.tasks}
        batches = [await do_step(house, step, every) for step in (1, 2, 3)]
        assert [len(batch.groups) for batch in batches] == [0, 0, 0]
        assert [batch.seen_groups for batch in batches] == [6, 6, 6]

    house.run(scenario)


def test_uniform_is_the_order_of_before(make_house) -> None:
    house = make_house(learn={"groups": 2, "curriculum": "uniform"})

    async def scenario(house) -> None:
        await house.step(0)
        await do_step(house, 1)
        assert await drawn(house, 0) == await drawn(house, 1) == []
        run_ctx = house.ctx.run_ctx
        order = list(islice(task_order(run_ctx.step_secret(0), 0, len(run_ctx.tasks)), len(opened(house, 0))))
        assert set(opened(house, 0)) == set(order)
        assert house.rows(sa.select(sa.func.count()).where(TASKS.c.seen_step >= 0))[0][0] == 2, "counted all the same"

    house.run(scenario)


def test_voided_stale_and_dropped_groups_are_not_held_against_their_tasks(make_house) -> None:
    house = make_house(learn={"groups": 2}, run={"steps": 9})

    async def scenario(house) -> None:
        await house.step(0)
        lease = await house.lease("eve")
        await house.submit("eve", lease)
        bad = {sample.rollout for group in lease.groups for sample in group.samples}
        await house.audit(lambda rollout: rollout in bad)
        assert {row.status for row in house.rows(sa.select(ROLLOUTS))} <= {*REOPENING, "held"}
        for step in (1, 2):
            await do_step(house, step)
        counts = house.rows(sa.select(TASKS.c.tried, TASKS.c.right).where(TASKS.c.tried > 0))
        assert {row.right / row.tried for row in counts} == {0.5}
        taken = house.rows(sa.select(GROUPS.c.group).where(GROUPS.c.batch_step.is_not(None)))
        assert sum(row.tried for row in counts) == pytest.approx(SAMPLES * len(taken), rel=0.1)

    house.run(scenario)


def test_work_of_a_node_that_was_ejected_meanwhile_does_not_count(make_house) -> None:
    house = make_house(learn={"groups": 2, "oversample": 1.0})

    async def scenario(house) -> None:
        await house.step(0)
        await house.work("eve", 2)
        await house.audit()
        await house.score(lambda rollout: 0.0)
        batch = await house.claim_step(1)
        assert batch is not None
        before = house.row(NODES, house.named("eve").id)
        eve = sa.update(NODES).where(NODES.c.node == before.node)
        await house.ctx.database.write(lambda c: c.execute(eve.values(status="quarantined")))
        await house.commit(batch)
        assert house.rows(sa.select(sa.func.count()).where(TASKS.c.tried > 0))[0][0] == 0
        await house.ctx.database.write(lambda c: c.execute(eve.values(status=before.status)))

    house.run(scenario)


def test_a_draw_is_written_down_for_the_operator_and_nobody_else(make_house) -> None:
    house = make_house(learn={"groups": 2}, coordinator={"redact": True})

    async def scenario(house) -> None:
        await house.step(0)
        (line,) = [line for line in house.ctx.metrics.lines() if line["kind"] == "drawn"]
        assert [one[0] for one in line["tasks"]] == [one.position for one in await drawn(house, 0)]
        assert line["step"] == 0
        (step,) = house.rows(sa.select(STEPS))
        assert json.loads(step.drawn) == line["tasks"]

    house.run(scenario)
