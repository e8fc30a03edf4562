"""A broken weight sync is named with node and step within one submission, and is told from malice."""

import msgspec
import pytest
import sqlalchemy as sa

from farflung.audits.possession import audit_nonce
from farflung.protocol import errors, probe
from farflung.protocol import messages as m
from farflung.protocol.identity import seal
from farflung.queries import views
from farflung.store.tables import AUDITS, EVENTS, LEASES, NODES
from farflung.trust.record import NodeRecord

BEFORE, NOW = b"weights of step 0", b"weights of step 1"


async def started(house) -> None:
    """Two committed steps that show their weights; a submission must show those of the latest."""
    await house.commit(await house.claim_step(0), probe=BEFORE)
    for name in ("ada", "bob"):
        for _ in range(2):
            lease = await house.lease(name)
            await house.submit(name, lease, showing(house, lease, BEFORE))
    while jobs := await house.claim_audits():
        for job in jobs:
            await answer(house, job, BEFORE)
    await house.score()
    batch = await house.claim_step(1)
    await house.commit(batch, probe=NOW, probe_before=BEFORE)


async def status(house) -> m.Status:
    return await house.ctx.database.read(lambda c: views.status(c, house.ctx.run_ctx, house.clock()))


def story(house, id: str) -> str:
    return house.rows(sa.select(EVENTS.c.detail).where(EVENTS.c.subject == id).order_by(EVENTS.c.id))[-1].detail


def showing(house, lease: m.Lease, weights: bytes) -> m.Submission:
    return house.honest(lease, possession=probe.answer(lease.nonce, weights))


async def answer(house, job: m.AuditJob, weights: bytes, name: str = "val-1") -> int:
    found = house.evidence(job, lambda rollout: False, possession=probe.answer(audit_nonce(job.audit), weights))
    return (
        await house.tell(name, f"audits/{job.audit}/evidence", seal(house.named(name), "evidence", found), m.Done)
    ).changed


@pytest.mark.parametrize(
    ("shown", "words"),
    [(BEFORE, "with the weights of step 0: a weight update was missed"), (b"x", "neither of this step"), (None, "any")],
)
def test_a_worker_that_missed_an_update_is_named_at_once_and_not_punished(house, shown, words: str) -> None:
    async def scenario(house) -> None:
        await started(house)
        ada = house.named("ada").id
        before = msgspec.msgpack.decode(house.row(NODES, ada).record, type=NodeRecord)
        lease = await house.lease("ada", loaded_step=1)
        assert lease.step == 1
        sent = showing(house, lease, shown) if shown else house.honest(lease)
        with pytest.raises(errors.WrongWeights, match=f"{ada} computed lease {lease.lease} of step 1 .*{words}"):
            await house.submit("ada", lease, sent)
        assert house.row(LEASES, lease.lease).status == "returned"
        (line,) = (await status(house)).warnings
        assert words in line
        assert f"{ada} computed lease" in line
        assert words in story(house, ada)
        assert msgspec.msgpack.decode(house.row(NODES, ada).record, type=NodeRecord) == before
        house.clock.now += 30
        lease = await house.lease("ada", loaded_step=1)
        await house.submit("ada", lease, showing(house, lease, NOW))

    house.run(scenario)


def test_a_validator_that_missed_an_update_ejects_nobody_and_is_named(house) -> None:
    async def scenario(house) -> None:
        await started(house)
        lease = await house.lease("cyd", loaded_step=1)
        await house.submit("cyd", lease, showing(house, lease, NOW))
        (job,) = await house.claim_audits()
        with pytest.raises(errors.WrongWeights, match=r"validator .* of step 1 with the weights of step 0"):
            await answer(house, job, BEFORE)
        assert house.row(AUDITS, job.audit).status == "open"
        assert house.named("val-1").id in (await status(house)).warnings[-1]
        (again,) = await house.claim_audits("val-2")
        assert await answer(house, again, NOW, "val-2") == 1
        assert house.row(NODES, house.named("cyd").id).status != "ejected"

    house.run(scenario)


def test_an_answer_of_another_lease_does_not_fit(house) -> None:
    async def scenario(house) -> None:
        await started(house)
        mine, other = await house.lease("ada", loaded_step=1), await house.lease("bob", loaded_step=1)
        copied = house.honest(mine, possession=probe.answer(other.nonce, NOW))
        with pytest.raises(errors.WrongWeights):
            await house.submit("ada", mine, copied)

    house.run(scenario)
