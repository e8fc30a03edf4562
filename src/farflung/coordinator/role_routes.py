"""Routes for the run's own scorers and validators, and for its operator."""

from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import Connection

from farflung.audits import audit, breaker, canary, possession, rollback, verdict
from farflung.coordinator.context import Context
from farflung.net.server import Call
from farflung.protocol import messages as m
from farflung.protocol.errors import Forbidden, Malformed, WrongWeights
from farflung.protocol.identity import Signed, unseal
from farflung.rollouts import accept


async def claim_scores(ctx: Context, call: Call) -> m.ScoreJobs:
    """Transcripts for a scorer."""
    ctx.require(call, "scorer")
    ask: m.Claim = call.message
    claim: Callable[[Connection], Any] = lambda c: (  # noqa: E731
        accept.claim_scores(c, ctx.run_ctx, call.node, ask.limit, ctx.clock()),
        ctx.run_ctx.latest(c),
    )
    rows, latest = await ctx.long_poll.poll(
        "score", partial(ctx.database.write, claim), lambda answer: bool(answer[0]), ask.wait_s
    )
    return m.ScoreJobs(latest=latest, jobs=[await _score_job(ctx, row) for row in rows])


async def _score_job(ctx: Context, row: Any) -> m.ScoreJob:
    ids = (await ctx.archive.body(row.submission)).rollouts[row.position].ids
    text = ctx.archive.text(ids)[: m.TRANSCRIPT_CHARS]
    return m.ScoreJob(rollout=row.rollout, task=row.payload, transcript=text)


async def scores(ctx: Context, call: Call) -> m.Done:
    """Rewards from a scorer."""
    ctx.require(call, "scorer")
    results = call.message.results
    changed = await ctx.write(lambda c: accept.take_scores(c, ctx.run_ctx, call.node, results, ctx.clock()))
    return m.Done(changed=changed)


async def claim_audits(ctx: Context, call: Call) -> m.AuditJobs:
    """Drawn rollouts for a validator."""
    ctx.require(call, "validator")
    ask: m.Claim = call.message

    def claim(connection: Connection) -> tuple[Any, list[m.AuditJob], m.Latest]:
        latest, now = ctx.run_ctx.latest(connection), ctx.clock()
        if canary.has_failed(connection, ctx.run_ctx, call.node, now - ctx.config.coordinator.claim_s):
            return (), [], latest
        rows = audit.claim_audits(connection, ctx.run_ctx, call.node, ask.limit, ask.linger_s, now)
        known = canary.jobs(connection, ctx.run_ctx, ctx.profiles, call.node, rows)
        return rows, known, latest

    rows, known, latest = await ctx.long_poll.poll(
        "audit", partial(ctx.database.write, claim), lambda answer: bool(answer[0]), ask.wait_s
    )
    return m.AuditJobs(latest=latest, jobs=[*known, *[await _audit_job(ctx, row) for row in rows]])


async def _audit_job(ctx: Context, row: Any) -> m.AuditJob:
    body = await ctx.archive.body(row.submission)
    return await ctx.database.read(lambda c: audit.job(c, ctx.run_ctx, ctx.profiles, row, body))


async def evidence(ctx: Context, call: Call) -> m.Done:
    """Sealed findings of a validator; the verdict is the coordinator's."""
    ctx.require(call, "validator")
    signed: Signed = call.message
    if signed.public != call.public:
        raise Forbidden("evidence must be sealed by the key that sends it")
    said = unseal(signed, verdict.KIND, m.Evidence)
    if said.audit != call.path["audit"]:
        raise Malformed(f"this evidence is about audit {said.audit}, the path names {call.path['audit']}")
    # what follows from wrong weights is committed before they are refused
    if wrong := await ctx.write(lambda c: possession.of_evidence(c, ctx.run_ctx, call.node, said, ctx.clock())):
        raise WrongWeights(wrong)
    changed = await ctx.write(
        lambda c: verdict.take_evidence(c, ctx.run_ctx, ctx.profiles, call.node, signed, ctx.clock())
    )
    return m.Done(changed=changed)


async def close_breaker(ctx: Context, call: Call) -> m.Done:
    """The operator lets verdicts and training go on."""
    ctx.require_operator(call)

    def release(connection: Connection) -> int:
        changed = breaker.close(connection, ctx.run_ctx, ctx.clock())
        verdict.fold_all(connection, ctx.run_ctx, ctx.profiles, ctx.clock())
        return changed

    return m.Done(changed=await ctx.write(release))


async def roll_back(ctx: Context, call: Call) -> m.Done:
    """The operator takes up an earlier step again."""
    ctx.require_operator(call)
    ask: m.Rollback = call.message
    change: Callable[[Connection], int] = lambda c: rollback.roll_back(  # noqa: E731
        c, ctx.run_ctx, ask.to_step, ask.without, ctx.clock()
    )
    return m.Done(changed=await ctx.write(change))
