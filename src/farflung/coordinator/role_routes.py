"""Routes for the run's own scorers and validators, and for its operator."""

from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import Connection

from farflung.audits import audit, breaker, canary, possession, rollback, verdict
from farflung.coordinator.context import Office
from farflung.net.server import Call
from farflung.protocol import messages as m
from farflung.protocol.errors import Forbidden, Malformed, WrongWeights
from farflung.protocol.identity import Signed, unseal
from farflung.rollouts import accept


async def claim_scores(office: Office, call: Call) -> m.ScoreJobs:
    """Transcripts for a scorer."""
    office.require(call, "scorer")
    ask: m.Claim = call.message
    claim: Callable[[Connection], Any] = lambda c: (  # noqa: E731
        accept.claim_scores(c, office.book, call.node, ask.limit, office.clock()),
        office.book.latest(c),
    )
    rows, latest = await office.hall.poll(
        "score", partial(office.database.write, claim), lambda answer: bool(answer[0]), ask.wait_s
    )
    return m.ScoreJobs(latest=latest, jobs=[await _score_job(office, row) for row in rows])


async def _score_job(office: Office, row: Any) -> m.ScoreJob:
    ids = (await office.archive.body(row.submission)).rollouts[row.position].ids
    text = office.archive.text(ids)[: m.TRANSCRIPT_CHARS]
    return m.ScoreJob(rollout=row.rollout, task=row.payload, transcript=text)


async def scores(office: Office, call: Call) -> m.Done:
    """Rewards from a scorer."""
    office.require(call, "scorer")
    results = call.message.results
    changed = await office.write(lambda c: accept.take_scores(c, office.book, call.node, results, office.clock()))
    return m.Done(changed=changed)


async def claim_audits(office: Office, call: Call) -> m.AuditJobs:
    """Drawn rollouts for a validator."""
    office.require(call, "validator")
    ask: m.Claim = call.message

    def claim(connection: Connection) -> tuple[Any, list[m.AuditJob], m.Latest]:
        latest, now = office.book.latest(connection), office.clock()
        if canary.has_failed(connection, office.book, call.node, now - office.config.coordinator.claim_s):
            return (), [], latest
        rows = audit.claim_audits(connection, office.book, call.node, ask.limit, ask.linger_s, now)
        known = canary.jobs(connection, office.book, office.profiles.run, call.node, rows[0].step) if rows else []
        return rows, known, latest

    rows, known, latest = await office.hall.poll(
        "audit", partial(office.database.write, claim), lambda answer: bool(answer[0]), ask.wait_s
    )
    return m.AuditJobs(latest=latest, jobs=[*known, *[await _audit_job(office, row) for row in rows]])


async def _audit_job(office: Office, row: Any) -> m.AuditJob:
    body = await office.archive.body(row.submission)
    return await office.database.read(lambda c: audit.job(c, office.book, office.profiles, row, body))


async def evidence(office: Office, call: Call) -> m.Done:
    """Sealed findings of a validator; the verdict is the coordinator's."""
    office.require(call, "validator")
    signed: Signed = call.message
    if signed.public != call.public:
        raise Forbidden("evidence must be sealed by the key that sends it")
    said = unseal(signed, verdict.KIND, m.Evidence)
    if said.audit != call.path["audit"]:
        raise Malformed(f"this evidence is about audit {said.audit}, the path names {call.path['audit']}")
    # what follows from wrong weights is committed before they are refused
    if wrong := await office.write(lambda c: possession.of_evidence(c, office.book, call.node, said, office.clock())):
        raise WrongWeights(wrong)
    changed = await office.write(
        lambda c: verdict.take_evidence(c, office.book, office.profiles, call.node, signed, office.clock())
    )
    return m.Done(changed=changed)


async def release_brake(office: Office, call: Call) -> m.Done:
    """The operator lets verdicts and training go on."""
    office.require_operator(call)

    def release(connection: Connection) -> int:
        changed = breaker.release(connection, office.book, office.clock())
        verdict.fold_all(connection, office.book, office.profiles, office.clock())
        return changed

    return m.Done(changed=await office.write(release))


async def roll_back(office: Office, call: Call) -> m.Done:
    """The operator takes up an earlier step again."""
    office.require_operator(call)
    ask: m.Rollback = call.message
    change: Callable[[Connection], int] = lambda c: rollback.roll_back(  # noqa: E731
        c, office.book, ask.to_step, ask.without, office.clock()
    )
    return m.Done(changed=await office.write(change))
