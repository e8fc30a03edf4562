"""Many keys, odd relays, unpaid-for garbage: attacks that need no weakness of the proof."""

import msgspec
import pytest
import sqlalchemy as sa

from farflung.net.node_stats import NodeStats
from farflung.protocol import errors, wire
from farflung.protocol import messages as m
from farflung.protocol.digest import digest_of
from farflung.store import ledger
from farflung.store.tables import AUDITS, GROUPS, LEASES, NODES, ROLLOUTS
from farflung.weights.download import RELAYS_TRIED, Downloads


@pytest.mark.parametrize(
    "url", ["http://a:b:c", "http://[::1", "http://\u0661", "http://x:123456", "http://-", "http://a_b"]
)
def test_a_relay_with_an_odd_address_is_refused(url: str) -> None:
    body = msgspec.json.encode({"version": 1, "role": "relay", "url": url})
    with pytest.raises(errors.Malformed):
        wire.decode(body, m.Register, "application/json")


@pytest.mark.parametrize("url", ["", "http://relay.example:7000", "https://[::1]:8080", "http://127.0.0.1"])
def test_a_relay_with_an_address_is_taken(url: str) -> None:
    assert wire.decode(msgspec.json.encode({"version": 1, "url": url}), m.Register, "application/json").url == url


def test_dead_relays_are_given_up_for_the_origin(house, tmp_path, monkeypatch) -> None:
    data, tried = b"a shard", []

    class Dead:
        def __init__(self, name: str) -> None:
            self.name = name

        async def download_into(self, path, file, *, limit_bytes):
            tried.append(self.name)
            raise errors.Unreachable("dead")

    class Origin:
        key = house.named("ada")

        async def download_into(self, path, file, *, limit_bytes):
            file.write(data)

    class Session:
        client, stats = Origin(), NodeStats()

    async def scenario(_) -> None:
        found = Downloads(Session(), tmp_path, use_relays=False)
        found._relays = {f"http://{i}": Dead(str(i)) for i in range(64)}
        digest = digest_of(data)
        await found.fetch([m.Shard(digest=digest, size_bytes=len(data))])
        assert (tmp_path / digest).read_bytes() == data
        assert len(tried) == RELAYS_TRIED

    house.run(scenario)


@pytest.fixture
def few(make_house):
    """Two slots for new keys."""
    return make_house(trust={"probation_slots": 2, "probation_waiting": 1}, learn={"groups": 16})


def test_new_keys_that_hold_leases_take_slots_and_leave_work_for_the_trusted(few) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await house.make_trusted("ada")
        held = [await house.ask(f"sybil-{i}") for i in range(12)]
        assert sum(lease is not None for lease in held) == 2
        assert await house.ask("ada") is not None, "there is work for whoever has earned trust"

    few.run(scenario)


async def become(house, name: str, role: str) -> None:
    register = m.Register(version=m.VERSION, name=name, role=role)
    await (await house.client(name)).post("/v1/nodes", register, m.Welcome)


def test_a_slot_is_kept_by_its_lease_and_no_role_is_changed_while_one_is_open(few) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await house.make_trusted("ada")
        got = []
        for name in (f"sybil-{i}" for i in range(40)):
            if lease := await house.ask(name):
                got.append((name, lease))
                with pytest.raises(errors.Conflict, match=f"{lease.lease} as a worker; submit it or hand it back"):
                    await become(house, name, "relay")
            else:
                await become(house, name, "relay")
        assert len(got) == 2
        assert await house.ask("ada") is not None
        for name, lease in got:
            await house.submit(name, lease)
            await become(house, name, "relay")
        assert house.statuses(AUDITS)["open"] == 2
        assert await house.ask("sybil-40") is None, "a relay that waits for its replay has a slot still"

    few.run(scenario)


def test_new_keys_leave_half_of_a_small_run_to_the_trusted(make_house) -> None:
    """Sixteen slots would do for all of sixteen groups ahead."""
    house = make_house(trust={"probation_slots": 16, "probation_waiting": 1}, learn={"groups": 8})

    async def scenario(house) -> None:
        await house.step(0)
        new = [await house.ask(f"sybil-{i}") for i in range(4)]
        assert None not in new, "without a trusted node new ones get all there is"
        for i, lease in enumerate(new):
            await house.give_back(f"sybil-{i}", lease)
        for i in range(8):
            await house.make_trusted(f"ada-{i}")
        await house.step(1)
        sybils = [lease for i in range(40) if (lease := await house.ask(f"eve-{i}"))]
        assert len({group.group for lease in sybils for group in lease.groups}) == 8
        trusted = [lease for i in range(8) if (lease := await house.ask(f"ada-{i}"))]
        assert len(trusted) == 8

    house.run(scenario)


def test_whoever_lets_a_lease_lapse_waits_before_the_next(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await house.lease("eve")
        await house.swept(after_s=101)
        assert house.statuses(LEASES)["expired"] == 1
        assert await house.ask("eve") is not None, "the pause was shorter than the lease"
        await house.swept(after_s=101)
        house.clock.now -= 100.5  # the second pause is twice as long
        row = house.rows(sa.select(LEASES).where(LEASES.c.status == "expired"))
        assert len(row) == 2

    house.run(scenario)


def test_text_without_variance_is_looked_at_before_it_is_paid_for_good(make_house) -> None:
    """A group whose rewards are equal is dropped; one rollout of each node's part meets the tripwire all the same."""
    house = make_house(
        trust={"audit_floor": 0.0, "audit_scale": 0.0, "audit_least": 0.0, "probation_waiting": 99},
        learn={"groups": 40, "oversample": 1.0},
    )

    async def scenario(house) -> None:
        await house.step(0)
        await house.make_trusted("eve")
        batch = None
        while batch is None:
            await house.work("eve")
            await house.audit()
            await house.score(lambda rollout: 0.0)
            batch = await house.claim_step(1)
        assert len(batch.groups) <= 1, "nothing to learn but from its first work"
        assert {len(group.rollouts) for group in batch.spare} == {1}
        assert len(batch.spare) == 40 - len(batch.groups)
        suspect = next(r for group in batch.spare for r in group.rollouts if not r.is_audited)
        trips = m.Trips(submissions=[suspect.submission])
        assert (await house.tell("trainer", "steps/1/trip", trips, m.Done)).changed >= 1
        again = await house.claim_step(1)
        assert suspect.submission not in {r.submission for group in again.spare for r in group.rollouts}
        paid = house.balance(ledger.escrow(house.named("eve").id)) + house.balance(ledger.credit(house.named("eve").id))
        await house.audit(lambda rollout: True)
        left = house.balance(ledger.escrow(house.named("eve").id)) + house.balance(ledger.credit(house.named("eve").id))
        assert left < paid, "what was paid for garbage is burned"
        assert house.row(NODES, house.named("eve").id).status == "probation"
        assert house.rows(sa.select(GROUPS).where(GROUPS.c.status == "dropped"))
        burned = house.balance(ledger.BURNED)
        await house.audit(lambda rollout: True)
        assert house.balance(ledger.BURNED) == burned, "burned once"
        assert set(house.statuses(AUDITS)) == {"done"}
        assert house.row(ROLLOUTS, suspect.rollout).status == "dropped"

    house.run(scenario)
