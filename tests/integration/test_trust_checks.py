"""Canaries for validators, the circuit breaker, diagnosis of suspects, chained receipts, rollback, redaction."""

import os
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
import sqlalchemy as sa
from tests.conftest import FP32

from farflung.adversity.faults import full_disk
from farflung.audits import canary
from farflung.audits.audit import open_audit
from farflung.protocol import errors, wire
from farflung.protocol import messages as m
from farflung.protocol.identity import Signed, seal
from farflung.queries import views
from farflung.rollouts.receipts import Receipts
from farflung.store import ledger
from farflung.store.tables import AUDITS, GROUPS, NODES, ROLLOUTS, RUNS, STEPS, SUBMISSIONS, VERDICTS
from farflung.tasks import admit
from farflung.trust.diagnose import UNSEEDED, diagnose
from farflung.trust.evidence import Profile, Profiles, Seen, Tally, from_json


async def status(house) -> m.Status:
    return await house.ctx.database.read(lambda c: views.status(c, house.ctx.run_ctx, house.clock()))


# --- canaries --------------------------------------------------------------------------------------------------------


async def tried(house, name: str = "val-1") -> list[m.AuditJob]:
    """A step with canaries, some work, and what a validator gets to answer."""
    await house.commit(await house.claim_step(0), canaries=True)
    await house.work("ada")
    return list(await house.claim_audits(name))


def is_spoiled(house, job: m.AuditJob) -> bool | None:
    """Whether a job is a spoiled canary; None for a real audit."""
    if house.rows(sa.select(AUDITS).where(AUDITS.c.audit == job.audit)):
        return None
    kept = canary.made(house.rows(sa.select(STEPS.c.canaries))[0][0]).canaries
    return job.rollouts[0].ids not in {one.ids for one in kept}


async def answer(house, jobs: list[m.AuditJob], finds, name: str = "val-1") -> None:
    """Answer jobs; `finds` says whether the tokens of a canary flip."""
    for job in jobs:
        spoiled = is_spoiled(house, job)
        await house.testify(job, lambda rollout, spoiled=spoiled: spoiled is not None and finds(spoiled), name)


def test_a_validator_gets_good_and_spoiled_canaries_first_and_its_evidence_counts_after_them(house) -> None:
    async def scenario(house) -> None:
        jobs = await tried(house)
        assert [is_spoiled(house, job) for job in jobs] == [False, True, None]
        with pytest.raises(errors.FailedCanary, match="has not passed the canaries of step 0"):
            await house.testify(jobs[-1], lambda rollout: False)
        await answer(house, jobs, lambda spoiled: spoiled)
        assert house.statuses(AUDITS) == {"done": 1}
        await house.work("bob")
        assert len(await house.claim_audits()) == 1, "once is enough for a step"
        assert (await house.claim_audits("val-2"))[:1] == [], "another one's claim"

    house.run(scenario)


@pytest.mark.parametrize(
    ("finds", "words"), [(lambda _: False, "finds no fault"), (lambda _: True, "takes an honest rollout for a cheat's")]
)
def test_a_broken_validator_ejects_nobody_and_is_named(house, finds, words: str) -> None:
    async def scenario(house) -> None:
        jobs = await tried(house)
        await answer(house, jobs[:-1], finds)
        with pytest.raises(errors.FailedCanary):
            await house.testify(jobs[-1], lambda rollout: True)
        warning = (await status(house)).warnings[-1]
        assert house.named("val-1").id in warning
        assert words in warning
        assert "step 0" in warning
        assert house.row(NODES, house.named("ada").id).status == "probation"
        assert await house.claim_audits() == [], "it gets nothing for a while"
        house.clock.now += 100
        again = [job for job in await house.claim_audits("val-2") if is_spoiled(house, job) is None]
        assert len(again) == 1, "somebody else may answer"

    house.run(scenario)


def test_each_arithmetic_has_canaries_of_its_own_and_a_second_opinion_the_other_one(house) -> None:
    """A node in bfloat16 beside one in float32: what replays the one says nothing of what replays the other."""
    both = ("bfloat16", "float32")
    half = msgspec.structs.replace(house.ctx.profiles.run, name="half", arithmetic="bfloat16", verified_in=both)
    house.ctx.profiles = Profiles(house.ctx.profiles.run, (half,))

    async def scenario(house) -> None:
        await house.commit(await house.claim_step(0), canaries=True)
        await house.work("ada")
        ben = await house.client("ben")
        await ben.post("/v1/nodes", m.Register(version=m.VERSION, profile="half"), m.Welcome)
        await house.work("ben")
        jobs = await house.claim_audits()
        tried = [job for job in jobs if is_spoiled(house, job) is not None]
        assert [(job.verify_in, from_json(job.profile).name) for job in tried] == [
            (("float32",), "torch-cpu-fp32"),
            (("float32",), "torch-cpu-fp32"),
            (both, "half"),
            (both, "half"),
        ]
        await answer(house, [job for job in jobs if job.verify_in == ("float32",)], lambda spoiled: spoiled)
        (of_ben,) = [job for job in jobs if job.verify_in == both and is_spoiled(house, job) is None]
        found = house.evidence(of_ben, lambda rollout: True, profile="half")
        with pytest.raises(errors.FailedCanary):
            await told(house, found)
        await answer(house, [job for job in tried if job.verify_in == both], lambda spoiled: spoiled)
        with pytest.raises(errors.Malformed, match="'half' was verified in bfloat16 or float32"):
            await told(house, msgspec.structs.replace(found, arithmetic="float16"))
        assert (await told(house, msgspec.structs.replace(found, arithmetic="float32"))).changed == 1
        row = house.rows(sa.select(AUDITS).where(AUDITS.c.audit == of_ben.audit))[0]
        await house.ctx.write(lambda c: open_audit(c, house.ctx.run_ctx, submission(c, row), ["r"], "confirm", 2e9))
        with house.ctx.database.engine.connect() as connection:
            (second,) = connection.execute(sa.select(AUDITS).where(AUDITS.c.kind == "confirm")).all()
            again = canary.jobs(connection, house.ctx.run_ctx, house.ctx.profiles, house.named("val-2").id, [second])
        assert {job.verify_in for job in again} == {both[::-1]}, "a second opinion, and so its canaries"

    house.run(scenario)


def test_a_run_goes_on_admitting_the_profiles_that_its_nodes_compute_in(house) -> None:
    """Judged by another profile than its own, an honest node would be ejected."""
    both = Profiles(house.ctx.profiles.run, (msgspec.structs.replace(house.ctx.profiles.run, name="half"),))
    house.ctx.profiles, alone = both, house.ctx.profiles

    async def scenario(house) -> None:
        await house.client("ada")
        await house.ctx.database.read(lambda c: admit.refuse_forgotten(c, alone))
        await (await house.client("ben")).post("/v1/nodes", m.Register(version=m.VERSION, profile="half"), m.Welcome)
        await house.ctx.database.read(lambda c: admit.refuse_forgotten(c, both))
        with pytest.raises(errors.ConfigError, match="compute in the numerics profile 'half'"):
            await house.ctx.database.read(lambda c: admit.refuse_forgotten(c, alone))

    house.run(scenario)


def submission(connection, audit):
    """The submission that an audit is of."""
    return connection.execute(sa.select(SUBMISSIONS).where(SUBMISSIONS.c.submission == audit.submission)).one()


async def told(house, found: m.Evidence) -> m.Done:
    """Evidence of the first validator."""
    signed = seal(house.named("val-1"), "evidence", found)
    return await house.tell("val-1", f"audits/{found.audit}/evidence", signed, m.Done)


def test_canaries_differ_by_validator_and_a_spoiled_one_is_never_the_original() -> None:
    ids = wire.pack_ids(list(range(3, 20)))
    found = {canary.spoiled(ids, 32, name) for name in ("a1", "a2", "a3")}
    assert len(found) == 3
    assert ids not in found
    changed = np.array(wire.unpack_ids(canary.spoiled(ids, 32, "a1"))) != np.array(wire.unpack_ids(ids))
    assert changed[:: canary.SPOILED_EVERY].all()
    assert changed.sum() == 5


# --- the circuit breaker ---------------------------------------------------------------------------------------------

CROWD = [f"node-{i}" for i in range(5)]


@pytest.fixture
def crowd(make_house):
    """A run in which every rollout is audited, nodes are soon trusted, and two that fail raise doubts."""
    return make_house(trust={"breaker_nodes": 2, "audit_floor": 1.0, "audit_least": 1.0}, learn={"groups": 32})


def test_when_many_good_nodes_fail_at_once_nothing_is_judged_until_the_operator_says_so(crowd) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        for name in CROWD:
            await house.make_trusted(name)
        for _ in range(3):
            for name in CROWD:
                await house.work(name)
        await house.audit(lambda rollout: True)
        said = await status(house)
        assert "5 nodes that did 100% of the work with a good record failed verification at step 0" in said.breaker
        assert said.breaker in said.warnings
        assert house.statuses(NODES, role="worker")["ejected"] == 0
        batch = await house.tell("trainer", "steps/1/claim", m.ClaimStep(), m.BatchAnswer)
        assert batch.batch is None
        assert "suspect" in batch.reason
        with pytest.raises(errors.Forbidden, match="the operator"):
            await (await house.client("ada")).post(f"{house.admin_path}/breaker/close", m.Empty(), m.Done)
        operator = house.line("coordinator")
        assert (await operator.post(f"{house.admin_path}/breaker/close", m.Empty(), m.Done)).changed == 1
        assert (await operator.post(f"{house.admin_path}/breaker/close", m.Empty(), m.Done)).changed in (0, 1)
        await operator.close()

    crowd.run(scenario)


# --- diagnosis -------------------------------------------------------------------------------------------------------

PROFILE = Profile("p", (0.1, 1.0), (0.3, 0.01, 1e-4), Tally((1, 1, 1), (0, 0, 0)), **FP32)


def seen(flipped: int, of: int = 20) -> list[Seen]:
    margin = np.array([2.0] * flipped + [0.0] * (of - flipped))
    return [Seen(np.full(of, 2.5), margin, np.full(of, 0.5), np.full(of, -1.0))]


def test_the_explanation_under_which_the_flips_vanish_is_named() -> None:
    tried = {"int8": seen(5), "the weights of step 3": seen(0), "temperature": seen(4)}
    assert diagnose(PROFILE, seen(6), tried) == "the weights of step 3"
    assert diagnose(PROFILE, seen(6), {"int8": seen(3), "temperature": seen(6)}) == "", "better, and still a cheat's"
    assert diagnose(PROFILE, seen(0), tried) == "", "nothing to explain"
    assert diagnose(PROFILE, seen(6), {}) == ""
    assert diagnose(PROFILE, seen(2, of=3), {"x": seen(0, of=3)}) == "", "too few tokens to say"


def life(rng: np.random.Generator, tokens: int, flip) -> list[Seen]:
    """Rollouts of twenty tokens of a policy that is sure at most positions; `flip` gives margins from (pick, gap)."""
    found: list[Seen] = []
    for _ in range(tokens // 20):
        pick = np.where(rng.random(20) < 0.7, 1 - 10.0 ** -rng.uniform(2, 6, 20), rng.uniform(0.3, 0.99, 20))
        gap = np.where(pick > 0.99, rng.uniform(4, 12, 20), rng.exponential(1.5, 20))
        found.append(Seen(gap, flip(rng, pick, gap), pick, np.full(len(gap), -1.0)))
    return found


def honest(rng, pick, gap):
    return np.zeros(len(gap))


def unseeded(rng, pick, gap):
    return np.where(rng.random(len(gap)) > pick, gap + rng.exponential(1.0, len(gap)), 0.0)


def fabricated(rng, pick, gap):
    return gap + rng.exponential(3.0, len(gap))


def noisier(rng, pick, gap):
    """Score noise of 0.15 nats where the profile has some 0.02."""
    return np.where(rng.normal(0, 0.15, len(gap)) > gap, gap, 0.0)


NARROW = Profile("p", (0.01, 0.05, 0.2), (0.3, 0.05, 1e-3, 1e-4), Tally((1,) * 4, (0,) * 4), **FP32)


@pytest.mark.parametrize("seed", range(8))
def test_what_other_noise_and_noisier_arithmetic_look_like_is_named(seed: int) -> None:
    rng, names = np.random.default_rng(seed), {}
    for cause in (unseeded, noisier, fabricated, honest):
        seen = life(rng, 320, cause)
        again = [Seen(one.gap, np.roll(one.margin, 1) * (rng.random(20) < 0.7), one.pick, one.lead) for one in seen]
        names[cause.__name__] = diagnose(NARROW, seen, {"temperature 0.9": again})
    assert names["unseeded"] == UNSEEDED
    assert names["noisier"].startswith("noisier arithmetic") or names["noisier"] == ""
    assert (names["fabricated"], names["honest"]) == ("", "")


def test_noisier_arithmetic_is_named_with_its_size() -> None:
    rng = np.random.default_rng(3)
    named = diagnose(NARROW, life(rng, 4000, noisier), {"temperature 0.9": life(rng, 4000, noisier)})
    (factor,) = re.findall(r"noisier arithmetic \(about ([\d.]+) times the profile's\)", named)
    assert 3 <= float(factor) <= 16


def test_a_temperature_that_explains_one_flip_by_chance_is_not_named() -> None:
    """One flip in 23 tokens, as in the demo: another temperature leaves it clean, and other noise is as good."""
    gap, pick = np.full(23, 9.0), np.full(23, 0.9999)
    gap[5], pick[5], margin = 0.4, 0.6, np.zeros(23)
    margin[5], lead = 0.4, np.full(23, -1.0)
    tried = {"temperature 0.9": [Seen(gap, np.zeros(23), pick, lead)]}
    assert diagnose(NARROW, [Seen(gap, margin, pick, lead)], tried) == ""


def test_a_would_be_ejection_is_tried_under_other_explanations_and_the_verdict_names_the_best(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        while house.row(NODES, (await house.client("eve")).key.id).status != "quarantined":
            await house.work("eve")
            for job in await house.claim_audits():
                await house.testify(job, lambda rollout: True)
        (job,) = await house.claim_audits()
        assert job.is_suspect
        assert job.cap == 0
        found = house.evidence(job, lambda rollout: True)
        honest = house.evidence(job, lambda rollout: False)
        told = m.Explanation(name="the weights of step 7: a weight update was missed", rollouts=honest.rollouts)
        found = msgspec.structs.replace(found, explanations=[told])
        await house.tell("val-1", f"audits/{job.audit}/evidence", seal(house.named("val-1"), "evidence", found), m.Done)
        verdict = (await status(house)).verdicts[-1]
        assert (verdict.outcome, verdict.diagnosis) == ("eject", told.name)
        assert verdict.reason.endswith(f"explained by {told.name}")

    house.run(scenario)


def test_a_second_opinion_is_asked_of_another_validator_where_there_is_one(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await house.client("val-2")
        while house.row(NODES, (await house.client("eve")).key.id).status != "quarantined":
            await house.work("eve")
            for job in await house.claim_audits():
                await house.testify(job, lambda rollout: True)
        assert await house.claim_audits("val-1") == []
        assert [job.is_suspect for job in await house.claim_audits("val-2")] == [True]
        house.clock.now += 1000
        assert [job.is_suspect for job in await house.claim_audits("val-1")] == [True], "val-2 fell silent"

    house.run(scenario)


# --- receipts --------------------------------------------------------------------------------------------------------


async def receipt(house, name: str) -> Signed:
    lease = await house.lease(name)
    return await house.tell(name, f"leases/{lease.lease}/submission", house.honest(lease), Signed)


def test_receipts_chain_across_restarts_and_a_dropped_one_is_noticed(house, tmp_path: Path, caplog) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        first, second, third = [await receipt(house, "ada") for _ in range(3)]
        key = house.ctx.run_ctx.key.public
        kept = Receipts(tmp_path)
        assert kept.keep(first, key)
        assert kept.keep(second, key)
        assert kept.keep(second, key)
        assert Receipts(tmp_path).keep(third, key)
        assert len((tmp_path / "receipts.jsonl").read_text().splitlines()) == 3
        (tmp_path / "other").mkdir()
        gap = Receipts(tmp_path / "other")
        gap.keep(first, key)
        assert not gap.keep(third, key)
        assert "receipts do not chain" in caplog.text
        with pytest.raises(errors.BadSignature):
            gap.keep(seal(house.named("mallory"), "receipt", m.Empty()), key)

    house.run(scenario)


def test_receipts_wait_for_room_and_half_a_line_is_dropped(house, tmp_path: Path, caplog) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        first, second, third, fourth = [await receipt(house, "ada") for _ in range(4)]
        key, path = house.ctx.run_ctx.key.public, tmp_path / "receipts.jsonl"
        kept = Receipts(tmp_path)
        kept.keep(first, key)
        with full_disk([os.getpid()]):
            assert kept.keep(second, key)
        assert len(path.read_text().splitlines()) == 1
        assert "receipts wait for room" in caplog.text
        assert kept.keep(third, key)
        assert len(path.read_text().splitlines()) == 3
        with path.open("ab") as file:
            file.write(b'{"payload": "AAAA')  # killed as it wrote
        assert Receipts(tmp_path).keep(fourth, key)
        assert len(path.read_text().splitlines()) == 4
        assert "do not chain" not in caplog.text

    house.run(scenario)


# --- rollback --------------------------------------------------------------------------------------------------------


async def roll_back(house, to_step: int, *without: str, name: str = "coordinator") -> int:
    operator = house.line(name)
    ask = m.Rollback(to_step=to_step, without=[house.named(one).id for one in without])
    try:
        return (await operator.post(f"{house.admin_path}/rollback", ask, m.Done)).changed
    finally:
        await operator.close()


async def trained(house, step: int) -> None:
    """Work of ada and eve, trained on."""
    while (batch := await house.claim_step(step)) is None:
        for name in ("ada", "eve"):
            await house.work(name)
        await house.audit()
        await house.score()
    await house.commit(batch)


def test_a_run_goes_on_from_an_earlier_step_without_a_node(make_house) -> None:
    house = make_house(run={"steps": 9})

    async def scenario(house) -> None:
        await trained(house, 0)
        for step in (1, 2):
            await trained(house, step)
        await house.work("ada")
        in_flight = await house.lease("eve")
        with pytest.raises(errors.Forbidden):
            await roll_back(house, 1, name="ada")
        with pytest.raises(errors.Conflict, match="step 7 is not committed"):
            await roll_back(house, 7)
        assert await roll_back(house, 1, "eve") == 3
        assert house.row(NODES, house.named("eve").id).status == "ejected"
        assert house.balance(ledger.escrow(house.named("eve").id)) == 0
        with pytest.raises(errors.FarflungError):
            await house.submit("eve", in_flight)
        assert house.rows(sa.select(GROUPS).where(GROUPS.c.step > 1, GROUPS.c.status.in_(("open", "complete")))) == []
        assert await house.ask("ada") is None, "what the policy of step 2 gives is not wanted any more"
        batch = await house.claim_step(3)
        assert (batch.restores, batch.groups) == (1, [])
        await house.commit(batch)
        assert (await house.lease("ada", loaded_step=2)).step == 3, "not under what was taken back, though it is loaded"
        await house.work("ada")
        assert (await house.claim_step(2)).restores == -1, "what was committed stays as it was"
        assert any("rolled back to step 1 by step 3" in text for text in (await status(house)).warnings)
        assert house.rows(sa.select(VERDICTS).where(VERDICTS.c.outcome == "eject"))

    house.run(scenario)


def test_a_batch_that_is_in_training_when_it_is_rolled_back_cannot_be_committed(make_house) -> None:
    house = make_house(run={"steps": 9})

    async def scenario(house) -> None:
        await trained(house, 0)
        await trained(house, 1)
        while (batch := await house.claim_step(2)) is None:
            await house.work("ada")
            await house.audit()
            await house.score()
        await roll_back(house, 0)
        with pytest.raises(errors.Conflict, match="step 2 was rolled back meanwhile"):
            await house.commit(batch)
        again = await house.claim_step(2)
        assert (again.restores, again.groups) == (0, [])
        await house.commit(again)
        assert house.statuses(ROLLOUTS)["batched"] == 0

    house.run(scenario)


# --- redaction -------------------------------------------------------------------------------------------------------


def test_while_a_step_is_open_nobody_sees_what_is_held_or_how_near_ejection_is(make_house) -> None:
    house = make_house(coordinator={"redact": True, "grants": make_house().config.coordinator.grants}, run={"steps": 9})

    async def scenario(house) -> None:
        await house.step(0)
        await house.work("ada")
        held = house.rows(sa.select(ROLLOUTS).where(ROLLOUTS.c.status == "held"))
        (audit,) = house.rows(sa.select(AUDITS))
        said = await status(house)
        assert (said.rollouts.get("held"), said.rollouts["received"], said.audits) == (None, len(held), {})
        line = house.line("nobody")
        story = await line.get(f"/v1/story/{held[0].rollout}", m.Story)
        assert [event.after for event in story.events] == ["leased", "received"]
        with pytest.raises(errors.NotFound):
            await line.get(f"/v1/story/{audit.audit}", m.Story)
        await house.audit(lambda rollout: rollout == held[0].rollout)
        node = next(n for n in (await status(house)).nodes if n.node == house.named("ada").id)
        assert (node.statistic, node.audits) == (0, 0)
        await line.close()

    house.run(scenario)


def test_the_run_table_knows_no_brake_at_first(house) -> None:
    assert house.rows(sa.select(RUNS.c.breaker, RUNS.c.breaker_after)) == [("", 0)]


# --- what is only odd ------------------------------------------------------------------------------------------------


def test_a_rollout_that_only_looks_odd_is_leased_again_and_nobody_is_blamed(house) -> None:
    """Two near flips in one rollout: far from voiding the submission, and yet nothing to learn from."""

    async def scenario(house) -> None:
        await house.step(0)
        await house.work("ada")
        (job,) = await house.claim_audits()
        odd = max(job.rollouts, key=lambda one: len(one.ids)).rollout
        found = house.evidence(job, lambda rollout: False)
        rollouts = []
        for one in found.rollouts:
            margin = np.zeros(len(one.gap) // 4)
            margin[:2] = 0.5 if one.rollout == odd else 0.0
            sure, close = np.full(len(margin), 0.9), np.full(len(margin), 9.0)
            close[:2] = 1.5, 0.7
            seen = {"margin": margin, "pick": sure, "gap": close}
            packed = {name: wire.pack_floats(values) for name, values in seen.items()}
            rollouts.append(msgspec.structs.replace(one, **packed))
        found = msgspec.structs.replace(found, rollouts=rollouts)
        await house.tell("val-1", f"audits/{job.audit}/evidence", seal(house.named("val-1"), "evidence", found), m.Done)
        assert house.row(ROLLOUTS, odd).status == "rejected"
        assert house.row(NODES, house.named("ada").id).status == "trusted"
        assert house.rows(sa.select(VERDICTS)) == []
        assert house.statuses(ROLLOUTS) == {"received": 3, "rejected": 1}

    house.run(scenario)
