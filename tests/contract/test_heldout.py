"""Held-out evaluation: on its own schedule, greedy and sampled, in the database, in metrics.jsonl and in the views."""

import json

import sqlalchemy as sa

from farflung.queries import evals
from farflung.store.tables import GROUPS, LEASES, ROLLOUTS


async def train(house, step: int) -> None:
    """One more step."""
    if step:
        await house.work("ada", 2)
        await house.audit()
        await house.score()
    await house.step(step)


async def evaluate(house) -> list[tuple[int, float, list[int]]]:
    """Do all leases that a validator gets; gives each one's step, temperature and samples per task."""
    seen: list[tuple[int, float, list[int]]] = []
    while (lease := await house.ask("val-1", slots=6)) is not None:
        assert lease.purpose == "eval"
        seen.append((lease.step, lease.temperature, [len(group.samples) for group in lease.groups]))
        await house.submit("val-1", lease)
        await house.score()
    return seen


def lines(house):
    """The evaluations in metrics.jsonl."""
    return [line for line in house.ctx.metrics.lines() if line["kind"] == "eval"]


def test_each_due_step_is_answered_greedily_and_sampled(make_house) -> None:
    house = make_house(run={"steps": 3}, eval={"every": 2, "tasks": 4, "samples": 3, "k": 2, "sampled_tasks": 3})

    async def scenario(house) -> None:
        await train(house, 0)
        assert await evaluate(house) == [(0, 0.0, [1] * 4), (0, 1.0, [3, 3]), (0, 1.0, [3])]
        await train(house, 1)
        assert await evaluate(house) == [], "step 1 is not due"
        await train(house, 2)
        await train(house, 3)
        assert [step for step, _, _ in await evaluate(house)] == [2, 2, 2, 3, 3, 3]
        await house.coordinator.sweeper.note_evals()
        await house.coordinator.sweeper.note_evals()
        assert [line["step"] for line in lines(house)] == [0, 2, 3]
        await house.swept()
        found = await house.ctx.database.read(lambda c: evals.evals(c, house.config))
        assert [json.loads(json.dumps(line))["pass_k"] for line in lines(house)] == [view.pass_k for view in found]
        first = found[0]
        # sample 1 of samples 0, 1, 2 is right: of the three ways to choose two of them, two have it
        assert (first.tasks, first.pass_k_tasks, first.k) == (4, 3, 2)
        assert abs((first.pass_k or 0) - 2 / 3) < 1e-9
        assert first.low <= first.score <= first.high
        assert (first.pass_k_low or 0) < 2 / 3 < (first.pass_k_high or 0)

    house.run(scenario)
    assert {row.purpose for row in house.rows(sa.select(LEASES.c.purpose).where(LEASES.c.node.is_not(None)))} == {
        "train",
        "eval",
    }


def test_samples_that_were_lost_are_leased_again_and_no_others(make_house) -> None:
    house = make_house(eval={"tasks": 1, "samples": 4, "k": 2})

    async def scenario(house) -> None:
        await train(house, 0)
        await house.submit("val-1", await house.lease("val-1", slots=6))
        await house.score()
        lease = await house.lease("val-1", slots=6)
        assert [len(group.samples) for group in lease.groups] == [4]
        await house.client("val-2")
        await house.swept(after_s=50)
        again = await house.lease("val-2", slots=6)
        assert again.groups[0].group == lease.groups[0].group
        assert [s.seed for s in again.groups[0].samples] == [s.seed for s in lease.groups[0].samples]
        await house.submit("val-2", again)
        await house.score()
        assert await house.ask("val-1") is None
        assert house.row(GROUPS, again.groups[0].group).status == "complete"
        paid = house.rows(sa.select(ROLLOUTS.c.is_audited).where(ROLLOUTS.c.group == again.groups[0].group))
        assert not any(row.is_audited for row in paid)

    house.run(scenario)


def test_nothing_is_shown_while_its_tasks_are_under_way(make_house) -> None:
    house = make_house(eval={"tasks": 2, "samples": 4, "k": 2})

    async def scenario(house) -> None:
        await train(house, 0)
        await house.submit("val-1", await house.lease("val-1", slots=1))
        await house.score()
        read = house.ctx.database.read
        assert await read(lambda c: evals.shown(c, house.config)) == []
        await house.submit("val-1", await house.lease("val-1", slots=1))
        await house.submit("val-1", await house.lease("val-1", slots=4))
        await house.score()
        (greedy,) = await read(lambda c: evals.shown(c, house.config))
        assert (greedy.tasks, greedy.pass_k) == (2, None)
        assert await read(lambda c: evals.finished(c, house.config, {0, 1})) == []

    house.run(scenario)
