"""Text that its seed does not give leaves the batch before it is trained on, whoever sent it."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest
import sqlalchemy as sa
from tests.conftest import tokens_of

from farflung.audits import node_record
from farflung.audits.tripwire import Suspect, inspect, tripped
from farflung.engine.base import Request
from farflung.protocol import errors
from farflung.protocol import messages as m
from farflung.store.tables import AUDITS, GROUPS, NODES, ROLLOUTS, VERDICTS
from farflung.trust.evidence import CHEATS, Profiles
from farflung.trust.profiles import load_profile


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


def test_text_that_its_seed_does_not_give_trips_wherever_it_is_replayed(tiny_qwen, device) -> None:
    engine_of = pytest.importorskip("farflung.engine.local").LocalEngine
    engine = engine_of(tiny_qwen().to(device), eos_ids=[])
    suspects = []
    for name, shift in (("honest", 0), ("unseeded", 1000)):
        asked = [Request((3, 4 + seed, 5), seed, 1.0, 16) for seed in range(4)]
        said = engine.generate([replace(one, seed=one.seed + shift) for one in asked])
        for one, done in zip(asked, said, strict=True):
            text = one.prompt_ids, one.seed, done.ids
            suspects.append(Suspect(f"{name}-{one.seed}", "0" * 64, name, *text, False, "torch-cpu-fp32"))
    found = inspect(engine, suspects, 1.0, 16, Profiles(load_profile("torch-cpu-fp32")))
    assert tripped((one.submission, one.log_ratios) for one in found) == ["unseeded"]
    assert {one.logp.device.type for one in found} == {"cpu"}
    assert [len(one.logp) for one in found] == [16] * 8


# --- what all replays add up to --------------------------------------------------------------------------------------


async def looked(house, batch: m.Batch, flips, *, is_liked: bool = False) -> int:
    """Report every rollout of a batch as replayed; `flips` gives how many tokens of one are not the seed's, all of them
    or none such as the policy likes better."""
    rollouts = [rollout for group in batch.groups for rollout in group.rollouts]
    told = [
        m.RolloutLook(rollout=one.rollout, flips=flips(one), liked=is_liked * flips(one), allowed=0.5)
        for one in rollouts
    ]
    message = m.Trips(submissions=[], looked=told)
    return (await house.tell("trainer", f"steps/{batch.step}/trip", message, m.Done)).changed


@pytest.mark.parametrize(
    ("flips", "is_liked", "reason"),
    [
        (lambda one: 5 * int(one.reward), False, b"its flips follow reward"),
        (lambda one: 2, True, b"its flips follow what the policy likes"),
    ],
)
def test_a_node_whose_flips_serve_it_is_ejected_before_its_batch_is_trained(
    make_house, flips, is_liked: bool, reason: bytes
) -> None:
    house = make_house(
        trust={"audit_floor": 0.0, "audit_scale": 0.0}, learn={"groups": 8, "oversample": 1.0}, run={"steps": 30}
    )

    async def scenario(house) -> None:
        await house.step(0)
        await house.make_trusted("eve")
        eve = house.named("eve").id
        for step in range(1, 30):
            while (batch := await house.claim_step(step)) is None:
                await house.work("eve")
                await house.audit()
                await house.score()
            changed = await looked(house, batch, flips, is_liked=is_liked)
            if changed:
                break
            await house.commit(batch)
        assert house.row(NODES, eve).status == "ejected"
        assert step < 5
        (verdict,) = house.rows(sa.select(VERDICTS.c.document).where(VERDICTS.c.outcome == "eject"))
        assert reason in verdict[0]
        again = await house.claim_step(step)
        assert not again.groups, "nothing of it is trained on"

    house.run(scenario)


def test_flips_that_follow_nothing_have_no_consequence_and_each_rollout_counts_once(quiet) -> None:
    async def scenario(house) -> None:
        batch = await batched(house)
        assert await looked(house, batch, lambda one: int(one.sample == 1)) == 0
        eve = house.named("eve").id
        watched = node_record.read(house.row(NODES, eve)).watched
        assert watched.rollouts == sum(
            house.row(ROLLOUTS, one.rollout).node == eve for group in batch.groups for one in group.rollouts
        )
        assert await looked(house, batch, lambda one: 9) == 0
        assert node_record.read(house.row(NODES, eve)).watched == watched, "asked twice, it changes nothing"

    quiet.run(scenario)


def test_a_rollout_of_another_batch_is_not_written_to(quiet) -> None:
    async def scenario(house) -> None:
        batch = await batched(house)
        lease = await house.lease("ada")
        await house.submit("ada", lease)
        other = lease.groups[0].samples[0].rollout
        message = m.Trips(submissions=[], looked=[m.RolloutLook(rollout=other, flips=3, liked=1, allowed=0.5)])
        await house.tell("trainer", f"steps/{batch.step}/trip", message, m.Done)
        assert house.row(ROLLOUTS, other).flips is None

    quiet.run(scenario)


# --- what the trainer downloads --------------------------------------------------------------------------------------


class Counting(httpx2.ASGITransport):
    """A way to a coordinator that counts what is asked for."""

    def __init__(self, app) -> None:
        super().__init__(app=app)
        self.asked = Counter[str]()

    async def handle_async_request(self, request):
        self.asked[request.url.path] += 1
        return await super().handle_async_request(request)


@pytest.mark.parametrize(("most_bytes", "times"), [(1 << 20, 1), (0, 3)])
def test_a_body_is_downloaded_once_for_a_step_where_there_is_room_to_keep_it(quiet, most_bytes, times) -> None:
    """The tripwire looks, looks again at what is left after it caught something, and the learner reads the same."""
    batches = pytest.importorskip("farflung.rollouts.batch")

    async def scenario(house) -> None:
        batch = await batched(house)
        way = Counting(house.app)
        client = house.line("trainer", transport=way)
        session = SimpleNamespace(client=client, path=lambda path: f"{house.path}/{path}")
        bodies = batches.Bodies(session, most_bytes)
        for _ in range(2):
            every = await batches.suspects(bodies, batch, is_all=True)
            assert all(list(one.ids) == tokens_of(one.seed) for one in every)
        rollouts = await batches.fetch(bodies, batch, divide_by_std=True)
        seeds = [one.seed for group in batch.groups for one in group.rollouts]
        assert [list(one.segments[1].ids) for one in rollouts] == [tokens_of(seed) for seed in seeds]
        digests = {one.submission for group in batch.groups for one in group.rollouts}
        paths = {digest: f"{house.path}/submissions/{digest}" for digest in digests}
        assert len(digests) > 1
        assert {way.asked[path] for path in paths.values()} == {times}
        assert {way.asked[f"{path}/logp"] for path in paths.values()} == {1}
        await batches.fetch(bodies, batch, divide_by_std=True)
        assert {way.asked[path] for path in paths.values()} == {times + 1}, "nothing is kept beyond the step"
        await client.close()

    quiet.run(scenario)
