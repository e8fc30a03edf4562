"""Evidence counts once: a sample never returns to a node that handed it in, and is folded at most once per key."""

import sqlalchemy as sa

from farflung.audits import node_record
from farflung.store.tables import AUDITS, GROUPS, NODES, ROLLOUTS


def samples_of(lease) -> set[tuple[str, int]]:
    return {(group.group, sample.index) for group in lease.groups for sample in group.samples}


async def hand_in(house, name: str, is_odd) -> tuple[str, int] | None:
    """One lease of a node, handed in and judged; gives a sample of it that was odd, if there is one."""
    lease = await house.ask(name)
    if lease is None:
        return None
    odd = {s.rollout for g in lease.groups for s in g.samples if is_odd(g.group, s.index)}
    await house.submit(name, lease)
    await house.audit(lambda rollout: rollout in odd)
    await house.score()
    return next(((g.group, s.index) for g in lease.groups for s in g.samples if s.rollout in odd), None)


def test_a_void_sample_goes_to_others_and_one_odd_sample_never_ejects(make_house) -> None:
    house = make_house(
        learn={"groups": 64}, lease={"rollouts": 8}, trust={"probation_waiting": 99, "probation_rollouts": 999}
    )

    async def scenario(house) -> None:
        await house.step(0)
        await house.client("bob")  # somebody else who may do what ada may not do again
        for _ in range(4):
            await hand_in(house, "ada", lambda *_: False)
        odd: set[tuple[str, int]] = set()

        def is_odd(group: str, index: int) -> bool:
            """Whatever ada does of this one sample is odd: her arithmetic and the seed are what they were."""
            odd.update({(group, index)} if not odd else ())
            return (group, index) in odd

        leased: list[tuple[str, int]] = []
        for _ in range(8):
            lease = await house.lease("ada")
            leased += samples_of(lease)
            bad = {s.rollout for g in lease.groups for s in g.samples if is_odd(g.group, s.index)}
            await house.submit("ada", lease)
            await house.audit(lambda rollout, bad=bad: rollout in bad)
        assert len(leased) == len(set(leased)), "a sample came back to the node that handed it in"
        assert house.row(NODES, house.named("ada").id).status == "probation"
        group, index = next(iter(odd))
        of_it = sa.and_(ROLLOUTS.c.group == group, ROLLOUTS.c.sample == index)
        assert house.statuses(ROLLOUTS, group=group, sample=index) == {"rejected": 1}
        await hand_in(house, "bob", lambda *_: False)
        assert house.rows(sa.select(ROLLOUTS.c.node).where(of_it, ROLLOUTS.c.status != "rejected"))

    house.run(scenario)


def test_a_group_that_nobody_at_work_may_finish_is_let_go(make_house) -> None:
    house = make_house(learn={"groups": 2})

    async def scenario(house) -> None:
        await house.step(0)
        (group, _) = await hand_in(house, "ada", lambda group, index: index == 0)
        assert house.row(GROUPS, group).status == "open"
        await house.client("bob")
        await house.swept(after_s=2)
        assert house.row(GROUPS, group).status == "open", "bob may do it"
        await house.swept(after_s=house.config.lease.lost_s - 1)
        await hand_in(house, "ada", lambda *_: False)  # ada is there, bob is not
        await house.swept(after_s=2)
        assert house.row(GROUPS, group).status == "dropped"

    house.run(scenario)


def test_a_sample_that_was_counted_is_not_counted_again_whatever_the_leases_did(house, monkeypatch) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        monkeypatch.setattr("farflung.tasks.assign._is_candidate", lambda offer, *_: bool(offer.samples))
        ada = house.named("ada").id
        for _ in range(3):
            await hand_in(house, "ada", lambda group, index: index == 0)
        record = node_record.read(house.row(NODES, ada))
        outcomes = [row[0] for row in house.rows(sa.select(AUDITS.c.outcome).where(AUDITS.c.node == ada))]
        assert outcomes == ["void"] * 3
        assert (record.audited_submissions, record.bad_submissions) == (1, 3)

    house.run(scenario)
