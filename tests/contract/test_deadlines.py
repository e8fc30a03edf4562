"""How long a node keeps a lease: progress extends it, within bounds that hold for a node that lies about it."""

import pytest
import sqlalchemy as sa

from farflung.protocol import messages as m
from farflung.protocol.errors import LeaseGone
from farflung.store.tables import LEASES, ROLLOUTS

FIRST_S, LONGEST_S = 100.0, 1000.0
BEAT_S = 25.0


@pytest.fixture
def patient(make_house):
    """A coordinator whose leases last 100 s, and up to 1,000 with progress."""
    return make_house(lease={"slowest_tokens_per_s": 0.016})


async def beat(house, name: str, **says) -> m.HeartbeatReply:
    return await house.tell(name, "heartbeat", m.Heartbeat(**says), m.HeartbeatReply)


async def claim_progress(house, name: str, lease: m.Lease, seconds: float, step: int = 1) -> float:
    """Beat for so long, each time with more than before; gives the seconds until the lease was taken away."""
    for number in range(int(seconds / BEAT_S)):
        await beat(house, name, lease=lease.lease, made=number * step)
        await house.swept(after_s=BEAT_S)
        if house.row(LEASES, lease.lease).status != "open":
            return (number + 1) * BEAT_S
    return seconds


def seeds_of(lease: m.Lease) -> set[int]:
    return {sample.seed for group in lease.groups for sample in group.samples}


def test_a_rollout_longer_than_a_lease_is_handed_in_whole(patient) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        lease = await house.lease("ada")
        assert lease.expires_at == house.clock() + FIRST_S
        assert await claim_progress(house, "ada", lease, 9 * FIRST_S) == 9 * FIRST_S
        assert (await house.submit("ada", lease)).rollouts == 4
        assert house.statuses(ROLLOUTS) == {"held": 4}
        await house.work("ada")
        assert house.row(LEASES, lease.lease).is_reissued is False

    patient.run(scenario)


def test_the_answer_says_how_long_is_left(patient) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        lease = await house.lease("ada")
        assert (await beat(house, "ada")).lease_left_s == 0
        assert (await beat(house, "ada", lease=lease.lease)).lease_left_s == FIRST_S
        house.clock.now += 30
        assert (await beat(house, "ada", lease=lease.lease, made=1)).lease_left_s == FIRST_S
        house.clock.now += 30
        assert (await beat(house, "ada", lease=lease.lease, made=1)).lease_left_s == FIRST_S - 30
        assert (await beat(house, "bob", lease=lease.lease, made=2)).lease_left_s == 0, "it is another's"
        assert (await beat(house, "ada", lease="l0", made=2)).lease_left_s == 0

    async def opened(house) -> None:
        await house.client("bob")
        await scenario(house)

    patient.run(opened)


ONCE_S = FIRST_S + BEAT_S
"""Where a node's first word, which may be true, was its last one."""


@pytest.mark.parametrize(("step", "lasts_s"), [(0, ONCE_S), (-1, ONCE_S), (1, LONGEST_S)], ids=["none", "back", "on"])
def test_claims_alone_keep_a_lease_no_longer_than_the_slowest_node_would_take(patient, step, lasts_s) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        lease = await house.lease("eve")
        held_s = 0.0
        while house.row(LEASES, lease.lease).status == "open":
            made = max(0, 1000 + step * int(held_s))
            await beat(house, "eve", lease=lease.lease, made=made)
            await house.swept(after_s=BEAT_S)
            held_s += BEAT_S
        assert lasts_s <= held_s <= lasts_s + BEAT_S
        await beat(house, "eve", lease=lease.lease, made=10**6)
        assert house.row(LEASES, lease.lease).status == "expired", "no claim brings it back"
        with pytest.raises(LeaseGone):
            await house.submit("eve", lease)
        assert seeds_of(await house.lease("bob")) == seeds_of(lease)

    patient.run(scenario)


def test_a_node_that_claims_and_never_delivers_holds_less_and_less(patient) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        held: list[float] = []
        while len(held) < 4:
            lease = await house.ask("eve")
            if lease is None:
                await house.swept(after_s=1.0)
                continue
            held.append(await claim_progress(house, "eve", lease, 2 * LONGEST_S))
        assert held == pytest.approx([LONGEST_S / 2**number for number in range(4)], abs=BEAT_S)

    patient.run(scenario)


def test_a_node_that_lets_one_lapse_and_works_again_has_its_time_back(patient) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await house.swept()
        lease = await house.lease("ada")
        await house.swept(after_s=FIRST_S + 1)
        assert house.row(LEASES, lease.lease).status == "expired"
        house.clock.now += 2
        await house.work("ada")
        house.clock.now += 2 * LONGEST_S
        lease = await house.lease("ada")
        assert await claim_progress(house, "ada", lease, 2 * LONGEST_S) >= LONGEST_S

    patient.run(scenario)


def test_nobody_extends_the_lease_of_another(patient) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        lease = await house.lease("ada")
        await house.client("eve")
        for number in range(5):
            await beat(house, "eve", lease=lease.lease, made=number)
            await beat(house, "ada")
            await house.swept(after_s=BEAT_S)
        assert house.row(LEASES, lease.lease).status == "expired"

    patient.run(scenario)


def test_work_that_no_step_can_take_any_more_is_not_waited_for(make_house) -> None:
    house = make_house(lease={"slowest_tokens_per_s": 0.016}, learn={"max_staleness": 0}, run={"steps": 9})

    async def scenario(house) -> None:
        await house.step(0)
        lease = await house.lease("eve")
        await beat(house, "eve", lease=lease.lease, made=1)
        await house.work("bob", 2)
        await house.audit()
        await house.score()
        await house.step(1)
        assert await claim_progress(house, "eve", lease, LONGEST_S) <= FIRST_S + BEAT_S

    house.run(scenario)


def test_a_node_that_waits_and_picks_gains_no_sample(patient) -> None:
    """What it leaves out after an extension comes back to others with the same seed, and it has to pause."""

    async def scenario(house) -> None:
        await house.step(0)
        lease = await house.lease("eve")
        await claim_progress(house, "eve", lease, 5 * FIRST_S)
        await house.submit("eve", lease, house.honest(lease, keep=1))
        first, *left = [sample for group in lease.groups for sample in group.samples]
        again = await house.lease("bob")
        assert {sample.seed for sample in left} <= seeds_of(again)
        assert first.seed not in seeds_of(again)
        assert await house.ask("eve") is not None
        lapsed = house.rows(sa.select(LEASES.c.lease).where(LEASES.c.is_partial))
        assert lapsed == [(lease.lease,)]

    patient.run(scenario)


def test_the_first_time_of_a_known_node_follows_from_its_speed(patient) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        lease = await house.lease("ada")
        await claim_progress(house, "ada", lease, 3 * FIRST_S)
        tokens = (await house.submit("ada", lease)).tokens
        again = await house.lease("ada")
        most = sum(len(group.samples) for group in again.groups) * again.max_new_tokens
        expected_s = most * 3 * FIRST_S / tokens
        assert expected_s > 3 * FIRST_S
        assert again.expires_at - house.clock() == pytest.approx(min(expected_s, LONGEST_S), rel=1e-3)

    patient.run(scenario)
