"""Coordinator: open audits, hand them out to validators, take claims back that lapse."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.audits import breaker
from farflung.protocol import seeds
from farflung.protocol.identity import Signed, unseal
from farflung.protocol.messages import AuditJob, AuditRollout, Lease, SubmissionBody
from farflung.protocol.numerics import Dtype
from farflung.store.bulk import insert_rows
from farflung.store.run import RunContext, new_id
from farflung.store.tables import AUDITS, GROUPS, LEASES, NODES, ROLLOUTS, STEPS, SUBMISSIONS, TASKS
from farflung.store.transitions import move, record
from farflung.trust.evidence import Profile, Profiles, to_json

OTHERS = 64
"""Further rollouts of a suspect's submission on which explanations are tried."""


def audit_nonce(audit: str) -> str:
    """The nonce of a validator's own show of possession, one per audit."""
    return hashlib.sha256(audit.encode()).hexdigest()


def open_audit(
    connection: Connection, run_ctx: RunContext, submission: Row[Any], rollouts: Sequence[str], kind: str, now: float
) -> str:
    """Open an audit of some rollouts of a submission; gives its id."""
    query = sa.select(sa.func.coalesce(sa.func.sum(ROLLOUTS.c.tokens), 0)).where(ROLLOUTS.c.rollout.in_(rollouts))
    lease = connection.execute(sa.select(LEASES.c.step).where(LEASES.c.lease == submission.lease)).one()
    tokens = connection.execute(query).scalar_one()
    drawn = Drawn(submission.submission, submission.lease, submission.node, rollouts, lease.step, tokens)
    (audit,) = open_audits(connection, run_ctx, [drawn], kind, now)
    return audit


@dataclass(frozen=True)
class Drawn:
    """Rollouts of a submission that are to be audited, the step of their policy and the number of their tokens."""

    submission: str
    lease: str
    node: str
    rollouts: Sequence[str]
    step: int
    tokens: int


def open_audits(
    connection: Connection, run_ctx: RunContext, drawn: Sequence[Drawn], kind: str, now: float
) -> list[str]:
    """Open audits of several submissions at once; gives their ids."""
    rows = [_row(run_ctx, one, kind, now) for one in drawn]
    insert_rows(connection, AUDITS, rows)
    for one, row in zip(drawn, rows, strict=True):
        fields = {"node": one.node, "rollouts": len(one.rollouts), "kind": kind}
        record(connection, "audit", [row["audit"]], "", "open", now, **fields)
    return [row["audit"] for row in rows]


def _row(run_ctx: RunContext, drawn: Drawn, kind: str, now: float) -> dict[str, Any]:
    return {
        "audit": new_id("a"),
        "run": run_ctx.run,
        "kind": kind,
        "submission": drawn.submission,
        "lease": drawn.lease,
        "node": drawn.node,
        "status": "open",
        "step": drawn.step,
        "rollouts": msgspec.json.encode(list(drawn.rollouts)).decode(),
        "opened_at": now,
        "tokens": drawn.tokens,
    }


def claim_audits(
    connection: Connection, run_ctx: RunContext, validator: str, limit: int, linger_s: float, now: float
) -> Sequence[Row[Any]]:
    """Open audits of one step, now this validator's for a while: that of the longest waiting, and others of its step.

    One that was claimed before and never answered waits from the end of that claim, so that an audit on which
    validators break does not keep them from all others.
    """
    if connection.execute(_ANY, {"run": run_ctx.run}).first() is None:
        return []
    _release(connection, run_ctx, now, AUDITS.c.claimed_until < now, why="the validator's claim lapsed")
    _release(connection, run_ctx, now, AUDITS.c.claimed_by == validator, why="the validator asks again")
    is_open = sa.and_(AUDITS.c.run == run_ctx.run, AUDITS.c.status == "open", _may_answer(run_ctx, validator, now))
    if (spared := breaker.spares(connection, run_ctx, now)) is not None:
        is_open = sa.and_(is_open, ~sa.and_(AUDITS.c.kind == "confirm", spared))  # others are to pass first
    since = sa.case((AUDITS.c.claimed_until > AUDITS.c.opened_at, AUDITS.c.claimed_until), else_=AUDITS.c.opened_at)
    if not _is_worth_claiming(connection, run_ctx, is_open, limit, now - linger_s):
        return []
    first = sa.select(AUDITS.c.step).where(is_open).order_by(since, AUDITS.c.step).limit(1)
    rows = connection.execute(
        sa.select(AUDITS)
        .where(is_open, AUDITS.c.step == first.scalar_subquery())
        .order_by(since)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    ids = [row.audit for row in rows]
    move(connection, "audit", ids, "open", "claimed", now, validator=validator)
    connection.execute(
        AUDITS.update()
        .where(AUDITS.c.audit.in_(ids))
        .values(claimed_by=validator, claimed_until=now + run_ctx.config.coordinator.claim_s)
    )
    return rows


_ANY = (  # there are none most of the times that a validator asks, so this is built once
    sa.select(AUDITS.c.audit)
    .where(AUDITS.c.run == sa.bindparam("run"), AUDITS.c.status.in_(("open", "claimed")))
    .limit(1)
)


def _is_worth_claiming(connection: Connection, run_ctx: RunContext, is_open: Any, limit: int, since: float) -> bool:
    """Whether audits wait that are many, or old, or not the routine ones of trusted nodes, or will get no company."""
    routine = sa.and_(AUDITS.c.kind == "draw", NODES.c.status == "trusted")
    urgent = sa.func.sum(sa.case((sa.or_(~routine, AUDITS.c.opened_at <= since), 1), else_=0))
    query = sa.select(sa.func.count(), urgent).join(NODES, NODES.c.node == AUDITS.c.node).where(is_open)
    count, pressing = connection.execute(query).one()
    return bool(pressing) or count >= limit or (count > 0 and not _is_any_generating(connection, run_ctx))


def _is_any_generating(connection: Connection, run_ctx: RunContext) -> bool:
    """Whether more may soon be drawn: between two steps in lockstep, say, the trainer waits for what was."""
    leased = sa.select(LEASES.c.lease).where(LEASES.c.run == run_ctx.run, LEASES.c.status == "open")
    return bool(connection.execute(sa.select(leased.exists())).scalar())


def _may_answer(run_ctx: RunContext, validator: str, now: float) -> Any:
    """Second opinions are for another validator than the first, where there is one."""
    first = AUDITS.alias()
    is_own = (
        sa.select(first.c.audit)
        .where(first.c.submission == AUDITS.c.submission, first.c.kind != "confirm", first.c.claimed_by == validator)
        .exists()
    )
    others = sa.and_(
        NODES.c.role == "validator",
        NODES.c.node != validator,
        NODES.c.seen_at > now - run_ctx.config.lease.lost_s,
        NODES.c.phase != "gone",
    )
    return ~sa.and_(AUDITS.c.kind == "confirm", is_own, sa.select(NODES.c.node).where(others).exists())


def _release(connection: Connection, run_ctx: RunContext, now: float, which: Any, why: str) -> None:
    query = sa.select(AUDITS.c.audit).where(AUDITS.c.run == run_ctx.run, AUDITS.c.status == "claimed", which)
    move(connection, "audit", list(connection.execute(query).scalars()), "claimed", "open", now, why=why)


def renew(connection: Connection, run_ctx: RunContext, node: str, now: float) -> None:
    """A validator or scorer that is alive keeps what it claimed: slow ones would take it from each other for ever."""
    for table, status in ((AUDITS, "claimed"), (ROLLOUTS, "received")):
        mine = sa.and_(table.c.run == run_ctx.run, table.c.status == status, table.c.claimed_by == node)
        until = now + run_ctx.config.coordinator.claim_s
        connection.execute(table.update().where(mine, table.c.claimed_until > 0).values(claimed_until=until))


def job(
    connection: Connection, run_ctx: RunContext, profiles: Profiles, audit: Row[Any], body: SubmissionBody
) -> AuditJob:
    """One audit as a validator gets it: only the tokens are the node's, all else is the coordinator's own."""
    sent = {rollout.rollout: rollout for rollout in body.rollouts}
    profile = profile_of(connection, profiles, audit.submission)
    drawn = msgspec.json.decode(audit.rollouts, type=list[str])
    others = [name for name in sent if name not in drawn][:OTHERS] if audit.kind == "confirm" else []
    secret = run_ctx.step_secret(audit.step)
    sealed = connection.execute(sa.select(LEASES.c.document).where(LEASES.c.lease == audit.lease)).scalar_one()
    lease = unseal(msgspec.msgpack.decode(sealed, type=Signed), "lease", Lease)
    rows = connection.execute(
        sa.select(ROLLOUTS.c.rollout, ROLLOUTS.c.sample, TASKS.c.task, TASKS.c.prompt_ids)
        .join(GROUPS, GROUPS.c.group == ROLLOUTS.c.group)
        .join(TASKS, TASKS.c.task == GROUPS.c.task)
        .where(ROLLOUTS.c.rollout.in_([*drawn, *others]))
        .order_by(ROLLOUTS.c.position)
    )
    sent_rollouts = [
        AuditRollout(
            rollout=row.rollout,
            prompt_ids=row.prompt_ids,
            seed=seeds.sample_seed(secret, row.task, row.sample),
            ids=sent[row.rollout].ids,
        )
        for row in rows
    ]
    return AuditJob(
        audit=audit.audit,
        step=audit.step,
        manifest=run_ctx.manifest_of(connection, audit.step),
        temperature=lease.temperature,  # as it was leased: a resumed run may have other settings
        max_new_tokens=lease.max_new_tokens,
        nonce=audit_nonce(audit.audit),
        probe=seeds.probe_key(secret).hex(),
        profile=to_json(profile),
        verify_in=verify_in(profile, audit.kind),
        cap=0.0 if audit.kind == "confirm" else run_ctx.config.trust.cap,
        is_suspect=audit.kind == "confirm",
        manifest_before=_manifest_before(connection, run_ctx, audit.step) if audit.kind == "confirm" else "",
        rollouts=[one for one in sent_rollouts if one.rollout in drawn],
        others=[one for one in sent_rollouts if one.rollout not in drawn],
    )


def verify_in(profile: Profile, kind: str) -> tuple[Dtype, ...]:
    """Arithmetics for a validator to replay in: a second opinion begins with the one that the first ended with."""
    return profile.verified_in[::-1] if kind == "confirm" else profile.verified_in


def profile_of(connection: Connection, profiles: Profiles, submission: str) -> Profile:
    """The numerics profile that a submission is judged by: the one its node had when it was handed in."""
    query = sa.select(SUBMISSIONS.c.profile).where(SUBMISSIONS.c.submission == submission)
    return profiles.of(connection.execute(query).scalar_one())


def _manifest_before(connection: Connection, run_ctx: RunContext, step: int) -> str:
    query = sa.select(STEPS.c.manifest_digest).where(STEPS.c.run == run_ctx.run, STEPS.c.step == step - 1)
    return connection.execute(query).scalar() or ""
