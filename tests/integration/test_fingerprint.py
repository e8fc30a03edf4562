"""Fingerprints from the engine to the verdict: honest ones pass whatever the batch, forgeries of the gallery fail."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import sqlalchemy as sa

from farflung.audits import replay_audits
from farflung.engine.base import Request
from farflung.protocol import errors, wire
from farflung.protocol import messages as m
from farflung.protocol.fingerprint import NUMBERS, POSITIONS, signs, unpack
from farflung.protocol.identity import seal
from farflung.redteam import GALLERY
from farflung.rollouts.submit import generate, submission_of
from farflung.rollouts.validate import inspect
from farflung.store.tables import AUDITS, LEASES, NODES, ROLLOUTS, SUBMISSIONS
from farflung.trust.fingerprint_distance import distance

ASKED = {"trust": {"probation_rollouts": 4, "probation_waiting": 99, "fingerprint": True, "audit_scale": 1000.0}}
NONCE, OTHER = "ab" * 32, "cd" * 32


@pytest.fixture
def asking(make_house):
    """A run that asks for fingerprints, with weights of step 0."""
    house = make_house(**ASKED)

    async def scenario(house) -> None:
        await house.step(0)

    house.run(scenario)
    return house


# --- the engine ------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(tiny_qwen):
    from farflung.engine.local import LocalEngine

    return LocalEngine(tiny_qwen())


def requests(count: int, nonce: str, *, max_new_tokens: int = 20) -> list[Request]:
    return [
        Request(tuple((5 * i + 3 * k) % 30 + 2 for k in range(3 + i % 3)), i, 1.0, max_new_tokens, nonce)
        for i in range(count)
    ]


def distances(engine, asked, done) -> list[float]:
    replays = engine.replay([(request, item.ids) for request, item in zip(asked, done, strict=True)])
    return [distance(item.fingerprint, replay.sketch) for item, replay in zip(done, replays, strict=True)]


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("max_new_tokens", [1, 2, 20])
def test_a_replay_finds_the_fingerprint_that_generation_gave(engine, rows: int, max_new_tokens: int) -> None:
    engine.max_rows = rows
    asked = requests(12, NONCE, max_new_tokens=max_new_tokens)
    assert max(distances(engine, asked, engine.generate(asked))) < 0.015


def test_it_is_the_projection_of_what_the_head_is_fed(engine) -> None:
    import torch

    (asked,) = requests(1, NONCE, max_new_tokens=3)
    (done,) = engine.generate([asked])
    fed = torch.tensor([[*asked.prompt_ids, *done.ids[:-1]]])
    hidden = engine.model.model(fed).last_hidden_state[0, -len(done.ids) :].numpy()
    unit = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    sketch = np.einsum("td,tdk->k", unit, signs(NONCE, unit.shape[1])[: len(unit)]) / len(unit) ** 0.5
    assert distance(done.fingerprint, sketch.astype(np.float32)) < 0.015


def test_asking_changes_no_token_and_who_does_not_ask_gets_none(engine) -> None:
    asked = [request if i % 2 else replace(request, nonce="") for i, request in enumerate(requests(8, NONCE))]
    done, plain = engine.generate(asked), engine.generate([replace(request, nonce="") for request in asked])
    assert [item.ids for item in done] == [item.ids for item in plain]
    assert [len(item.fingerprint) for item in done] == [NUMBERS if i % 2 else 0 for i in range(8)]
    replays = engine.replay([(request, item.ids) for request, item in zip(asked, done, strict=True)])
    assert [replay.sketch is not None for replay in replays] == [bool(i % 2) for i in range(8)]


def test_leases_of_several_nonces_share_a_batch(engine) -> None:
    asked = requests(4, NONCE) + requests(4, OTHER)
    done = engine.generate(asked)
    assert max(distances(engine, asked, done)) < 0.015
    swapped = [replace(item, fingerprint=done[(i + 4) % 8].fingerprint) for i, item in enumerate(done)]
    assert min(distances(engine, asked, swapped)) > 0.5


def test_only_the_first_tokens_count(engine) -> None:
    (asked,) = requests(1, NONCE, max_new_tokens=POSITIONS + 4)
    asked = replace(asked, temperature=0.0)
    engine.eos_ids = frozenset()
    long, short = engine.generate([asked])[0], engine.generate([replace(asked, max_new_tokens=POSITIONS)])[0]
    assert len(long.ids) > len(short.ids)
    assert long.fingerprint == short.fingerprint


def test_other_weights_and_other_prompts_are_far(engine, tiny_qwen) -> None:
    from farflung.engine.local import LocalEngine

    asked = requests(8, NONCE, max_new_tokens=1)
    other = LocalEngine(tiny_qwen(seed=1)).generate(asked)
    assert min(distances(engine, asked, other)) > 0.5
    elsewhere = engine.generate([replace(one, prompt_ids=(*one.prompt_ids, 7)) for one in asked])
    assert min(distances(engine, asked, elsewhere)) > 0.25


# --- the door --------------------------------------------------------------------------------------------------------


def lease_of(house, name: str = "ada") -> m.Lease:
    leases: list[m.Lease] = []

    async def scenario(house) -> None:
        leases.append(await house.lease(name))

    house.run(scenario)
    return leases[0]


def changed(submission: m.Submission, fingerprint: bytes, count: int = 1) -> m.Submission:
    """The submission with another fingerprint in its first rollouts."""
    first = [msgspec.structs.replace(one, fingerprint=fingerprint) for one in submission.rollouts[:count]]
    return msgspec.structs.replace(submission, rollouts=[*first, *submission.rollouts[count:]])


@pytest.mark.parametrize("fingerprint", [b"", b"\0" * 31, b"\x80" * 32])
def test_a_missing_or_malformed_fingerprint_is_turned_away_and_the_lease_stays_open(asking, fingerprint) -> None:
    async def scenario(house) -> None:
        lease = await house.lease("ada")
        with pytest.raises(errors.Rejected, match="fingerprint"):
            await house.submit("ada", lease, changed(house.honest(lease), fingerprint))
        assert house.row(LEASES, lease.lease).status == "open"
        await house.submit("ada", lease)

    asking.run(scenario)


def test_one_that_is_too_long_is_no_message(asking) -> None:
    lease = lease_of(asking)
    sent = changed(asking.honest(lease), b"\0" * 33)
    with pytest.raises(errors.Malformed):
        wire.decode(wire.encode(sent), m.Submission)


def test_a_fingerprint_that_nobody_asked_for_is_turned_away(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        lease = await house.lease("ada")
        assert not lease.fingerprint
        with pytest.raises(errors.Rejected, match="asks for none"):
            await house.submit("ada", lease, changed(house.honest(lease), b"\0" * NUMBERS))

    house.run(scenario)


def test_it_is_part_of_the_submission_s_name(asking) -> None:
    lease = lease_of(asking)
    names = [
        inspect(lease, lease.node, sent, 32, frozenset({2})).digest
        for sent in (asking.honest(lease), changed(asking.honest(lease), b"\1" * NUMBERS))
    ]
    assert names[0] != names[1]


def test_once_sent_it_cannot_be_changed(asking) -> None:
    async def scenario(house) -> None:
        lease = await house.lease("ada")
        sent = changed(house.honest(lease), b"\1" * NUMBERS)
        receipt = await house.submit("ada", lease, sent)
        with pytest.raises(errors.LeaseGone):
            await house.submit("ada", lease)
        (job,) = await house.claim_audits()
        assert job.fingerprint == lease.nonce
        assert {one.fingerprint for one in job.rollouts} == {one.fingerprint for one in sent.rollouts}
        assert house.row(SUBMISSIONS, receipt.submission).lease == lease.lease

    asking.run(scenario)


def test_evaluation_is_not_asked_for_them(asking) -> None:
    lease = lease_of(asking, "val-1")
    assert (lease.purpose, lease.fingerprint) == ("eval", False)


# --- the verdict -----------------------------------------------------------------------------------------------------


def test_honest_fingerprints_pass(asking) -> None:
    async def scenario(house) -> None:
        await house.make_trusted("ada")
        assert house.statuses(ROLLOUTS)["void"] == house.statuses(ROLLOUTS)["rejected"] == 0

    asking.run(scenario)


FORGERIES = ["forged-fingerprint", "constant-fingerprint", "zero-fingerprint"]


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_fingerprint_voids_its_submission_ejects_nobody_and_the_work_goes_to_others(asking, name) -> None:
    attack = GALLERY[name]()

    async def scenario(house) -> None:
        if name == "forged-fingerprint":  # it needs a first lease to keep fingerprints of
            lease = await house.lease("eve")
            await house.submit("eve", lease, attack.alter(lease, house.honest(lease)))
            assert await house.audit() == 1
        lease = await house.lease("eve")
        await house.submit("eve", lease, attack.alter(lease, house.honest(lease)))
        await house.audit()
        mine = [sample.rollout for group in lease.groups for sample in group.samples]
        assert {house.row(ROLLOUTS, rollout).status for rollout in mine} <= {"rejected", "void"}
        assert house.row(NODES, house.named("eve").id).status == "probation"
        (audit,) = house.rows(sa.select(AUDITS).where(AUDITS.c.lease == lease.lease))
        assert audit.outcome == "void"
        seeds = {sample.seed for group in lease.groups for sample in group.samples}
        again = [await house.lease(other) for other in ("bob", "cyd", "dan")]
        assert seeds <= {sample.seed for one in again for group in one.groups for sample in group.samples}

    asking.run(scenario)


def test_one_bad_one_of_four_is_rejected_and_the_rest_void_with_it(asking) -> None:
    async def scenario(house) -> None:
        lease = await house.lease("eve")
        await house.submit("eve", lease, changed(house.honest(lease), b"\0" * NUMBERS))
        await house.audit()
        assert house.statuses(ROLLOUTS, lease=lease.lease) == {"rejected": 1, "void": 3}

    asking.run(scenario)


def test_missing_is_turned_away_at_the_door(asking) -> None:
    attack = GALLERY["missing-fingerprint"]()

    async def scenario(house) -> None:
        lease = await house.lease("eve")
        with pytest.raises(errors.Rejected):
            await house.submit("eve", lease, attack.alter(lease, house.honest(lease)))

    asking.run(scenario)


def test_evidence_without_a_distance_decides_nothing(asking) -> None:
    async def scenario(house) -> None:
        await house.work("ada")
        (job,) = await house.claim_audits()
        blind = msgspec.structs.replace(job, fingerprint="")
        signed = seal(house.named("val-1"), "evidence", house.evidence(blind, lambda rollout: False))
        with pytest.raises(errors.Malformed, match="no distance"):
            await house.tell("val-1", f"audits/{job.audit}/evidence", signed, m.Done)
        assert house.row(AUDITS, job.audit).status == "claimed"
        assert await house.testify(job, lambda rollout: False) == 1

    asking.run(scenario)


def test_a_distance_that_nobody_asked_for_decides_nothing(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await house.work("ada")
        (job,) = await house.claim_audits()
        seeing = msgspec.structs.replace(job, fingerprint=NONCE)
        signed = seal(house.named("val-1"), "evidence", house.evidence(seeing, lambda rollout: False))
        with pytest.raises(errors.Malformed, match="a distance"):
            await house.tell("val-1", f"audits/{job.audit}/evidence", signed, m.Done)

    house.run(scenario)


def test_a_verifier_that_computes_nonsense_gives_no_distance(asking, engine) -> None:
    lease_of(asking)

    async def scenario(house) -> None:
        await house.work("bob")
        jobs = await house.claim_audits()
        engine.model.model.norm.weight.data.fill_(float("nan"))
        (found,) = replay_audits.replay(engine, jobs, "test", "torch-cpu-fp32", lambda nonce, key: "")
        assert all(one.distance is None for one in found.rollouts)

    asking.run(scenario)


def test_a_profile_without_a_bound_passes_nothing(asking) -> None:
    profiles = asking.ctx.profiles
    blind = msgspec.structs.replace(profiles.run, fingerprint=0.0)
    asking.ctx.profiles = profiles._replace(run=blind)

    async def scenario(house) -> None:
        lease = await house.lease("ada")
        await house.submit("ada", lease)
        await house.audit()
        assert house.statuses(ROLLOUTS, lease=lease.lease) == {"rejected": 4}

    asking.run(scenario)


# --- worker and validator over one engine ----------------------------------------------------------------------------


def test_what_a_worker_sends_a_validator_finds_near(asking, engine) -> None:
    engine.eos_ids = frozenset({2})
    lease = lease_of(asking)
    done = generate(engine, lease, lambda: False)
    sent = submission_of(done, assigned=len(done), generate_s=1.0)

    async def scenario(house) -> None:
        await house.submit("ada", lease, sent)
        jobs = await house.claim_audits()
        (found,) = replay_audits.replay(engine, jobs, "test", "torch-cpu-fp32", lambda nonce, key: "")
        assert all(one.distance is not None and one.distance < 0.015 for one in found.rollouts)
        assert all(len(unpack(one.fingerprint)) == NUMBERS for one in jobs[0].rollouts)

    asking.run(scenario)
