"""A heartbeat tells a node's owner how it stands, and no more than a cheat may know."""

from farflung.audits import node_record
from farflung.protocol import messages as m
from farflung.queries.rulings import SHORT
from farflung.store.tables import NODES


async def beat(house, name: str) -> m.HeartbeatReply:
    return await house.tell(name, "heartbeat", m.Heartbeat(), m.HeartbeatReply)


def test_probation_is_counted_down_and_trust_shows_no_count(make_house) -> None:
    house = make_house(trust={"probation_rollouts": 8, "probation_waiting": 99})

    async def scenario(house) -> None:
        await house.step(0)
        first = await beat(house, "ada")
        assert (first.status, first.clean, first.needed, first.rulings) == ("probation", 0, 8, [])
        await house.work("ada")
        await house.audit()
        assert (await beat(house, "ada")).clean == 4
        await house.work("ada")
        await house.audit()
        after = await beat(house, "ada")
        assert (after.status, after.clean, after.needed) == ("trusted", 0, 8)
        granted = await beat(house, "val-1")
        assert (granted.clean, granted.needed) == (0, 0)

    house.run(scenario)


def test_a_void_is_told_at_once_and_its_detail_once_the_step_is_closed(make_house) -> None:
    house = make_house(coordinator={"redact": True}, trust={"probation_rollouts": 4, "probation_waiting": 99})

    async def scenario(house) -> None:
        await house.step(0)
        (lease,) = await house.work("eve")
        receipt = await house.submit("eve", lease)
        await house.audit(lambda rollout: True)
        told = await beat(house, "eve")
        (ruling,) = told.rulings
        assert (told.status, told.clean, told.needed) == ("probation", 0, 8)
        assert (ruling.outcome, ruling.submission, ruling.reason) == ("void", receipt.submission, SHORT["void"])
        for step in (1, 2, 3):
            await house.work("ada", 2)
            await house.audit()
            await house.score()
            await house.step(step)
        (later,) = (await beat(house, "eve")).rulings
        assert later.id == ruling.id
        assert "audited tokens are not what the seeds give" in later.reason
        assert (await beat(house, "ada")).rulings == []

    house.run(scenario)


def test_an_ejection_is_told_by_the_next_heartbeat(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await house.work("eve", 3)
        await house.audit(lambda rollout: True)
        told = await beat(house, "eve")
        assert told.status == house.row(NODES, house.named("eve").id).status == "ejected"
        assert [one.outcome for one in told.rulings][-2:] == ["quarantine", "eject"]
        assert told.rulings == sorted(told.rulings, key=lambda one: one.id)
        assert node_record.read(house.row(NODES, house.named("eve").id)).bad_submissions

    house.run(scenario)
