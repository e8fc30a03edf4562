"""Text that its seed does not give leaves the batch before it is trained on, whoever sent it."""

import numpy as np
import pytest

from farflung.protocol import errors
from farflung.protocol import messages as m
from farflung.rollouts.tripwire import tripped
from farflung.store.tables import AUDITS, GROUPS, NODES, ROLLOUTS
from farflung.trust.evidence import CHEATS


async def batched(house) -> m.Batch:
    """A batch with the unaudited work of a trusted node, besides another's."""
    await house.step(0)
    await house.make_trusted("eve")
    for name in ("eve", "eve", "ada"):
        await house.work(name)
    await house.audit()
    await house.score()
    batch = await house.claim_step(1)
    assert batch is not None
    return batch


def of(house, batch: m.Batch, name: str) -> list[m.BatchRollout]:
    node = house.named(name).id
    rollouts = [rollout for group in batch.groups for rollout in group.rollouts if not rollout.is_audited]
    return [rollout for rollout in rollouts if house.row(ROLLOUTS, rollout.rollout).node == node]


async def trip(house, batch: m.Batch, submissions: list[str], name: str = "trainer") -> int:
    return (await house.tell(name, f"steps/{batch.step}/trip", m.Trips(submissions=submissions), m.Done)).changed


@pytest.fixture
def quiet(make_house):
    """A run whose trusted nodes are never audited by chance."""
    return make_house(trust={"audit_floor": 0.0, "audit_scale": 0.0}, learn={"groups": 4, "oversample": 1.0})


def test_what_trips_is_audited_in_full_and_never_trained_when_it_fails(quiet) -> None:
    async def scenario(house) -> None:
        batch = await batched(house)
        suspects = of(house, batch, "eve")
        assert suspects, "there is something to catch"
        assert await trip(house, batch, [suspects[0].submission]) >= 1
        again = await house.claim_step(1)
        assert suspects[0].submission not in {r.submission for group in again.groups for r in group.rollouts}
        assert await trip(house, again, [suspects[0].submission]) == 0, "asked twice, it changes nothing"
        await house.audit(lambda rollout: rollout == suspects[0].rollout)
        assert house.row(ROLLOUTS, suspects[0].rollout).status == "rejected"
        assert house.row(NODES, house.named("eve").id).status == "probation"
        await house.commit(again)
        assert house.statuses(ROLLOUTS, submission=suspects[0].submission)["trained"] == 0

    quiet.run(scenario)


def test_a_false_alarm_costs_an_audit_and_nothing_else(quiet) -> None:
    async def scenario(house) -> None:
        batch = await batched(house)
        one = of(house, batch, "eve")[0]
        await trip(house, batch, [one.submission])
        await house.audit()
        row = house.row(ROLLOUTS, one.rollout)
        assert (row.status, row.is_audited) == ("accepted", True)
        assert house.row(GROUPS, row.group).status == "complete"
        assert house.row(NODES, house.named("eve").id).status == "trusted"
        assert "open" not in house.statuses(AUDITS)

    quiet.run(scenario)


def test_only_the_trainer_trips_and_only_an_open_step(quiet) -> None:
    async def scenario(house) -> None:
        batch = await batched(house)
        one = of(house, batch, "eve")[0]
        with pytest.raises(errors.Forbidden):
            await trip(house, batch, [one.submission], "ada")
        await house.commit(batch)
        with pytest.raises(errors.Conflict, match="step 1 is not open"):
            await trip(house, batch, [one.submission])

    quiet.run(scenario)


def test_one_bad_rollout_trips_its_whole_submission() -> None:
    good, bad = np.full(len(CHEATS), -2.0), np.full(len(CHEATS), 9.0)
    assert tripped([("a", good), ("b", good), ("b", bad), ("c", good)]) == ["b"]
    assert tripped([]) == []
