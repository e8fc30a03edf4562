"""Coordinator: carry a verdict out on rollouts, groups, leases, audits and the ledger."""

from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.audits.audit import open_audit
from farflung.learner.filters import is_informative
from farflung.store import payment
from farflung.store.run import RunContext
from farflung.store.tables import AUDITS, GROUPS, LEASES, ROLLOUTS, SUBMISSIONS
from farflung.store.transitions import end_leases, move


def clear(connection: Connection, run_ctx: RunContext, audit: Row[Any], suspicious: Sequence[str], now: float) -> None:
    """The audit passed: held rollouts go on to the scorers, or back to where they were if they were scored before.

    But for rollouts that look odd by themselves: no node is blamed, and the sample is leased to another node.
    """
    drawn = ROLLOUTS.c.rollout.in_(msgspec.json.decode(audit.rollouts, type=list[str]))
    connection.execute(ROLLOUTS.update().where(drawn).values(is_audited=True))
    _pay_late(connection, run_ctx, drawn, suspicious, now)
    held = sa.and_(drawn, ROLLOUTS.c.status == "held")
    query = sa.select(ROLLOUTS.c.rollout).where(held, ROLLOUTS.c.rollout.in_(suspicious))
    move(connection, "rollout", list(connection.execute(query).scalars()), "held", "rejected", now, audit=audit.audit)
    rows = connection.execute(sa.select(ROLLOUTS).where(held)).all()
    scored = [row for row in rows if row.reward is not None]
    fresh = [row.rollout for row in rows if row.reward is None]
    move(connection, "rollout", fresh, "held", "received", now, audit=audit.audit)
    move(connection, "rollout", [row.rollout for row in scored], "held", "accepted", now, audit=audit.audit)
    for group in dict.fromkeys(row.group for row in scored):
        complete(connection, group, now)


def _pay_late(connection: Connection, run_ctx: RunContext, drawn: Any, suspicious: Sequence[str], now: float) -> None:
    """Rollouts that were let go while they waited for their replay are paid for when that has passed."""
    unpaid = sa.and_(ROLLOUTS.c.status == "dropped", ROLLOUTS.c.reward.is_(None), ROLLOUTS.c.escrow_step.is_(None))
    rows = connection.execute(sa.select(ROLLOUTS).where(drawn, unpaid, ROLLOUTS.c.rollout.not_in(suspicious))).all()
    payment.pay(connection, run_ctx, rows, now)


def hold(
    connection: Connection,
    run_ctx: RunContext,
    which: Any,
    why: str,
    now: float,
    live: Sequence[str] = ("received", "accepted"),
) -> int:
    """Hold untrained rollouts that no audit has passed, and have all of them replayed. Gives how many audits it opens.

    Batched ones are in the trainer's hands: only the trainer may ask for them to leave the batch, with their groups.
    Dropped ones were paid for all the same, and are replayed too while that can be burned.
    """
    unproven = sa.and_(which, ROLLOUTS.c.run == run_ctx.run, ~ROLLOUTS.c.is_audited, _still_untrained(live))
    rows = connection.execute(sa.select(ROLLOUTS).where(unproven).order_by(ROLLOUTS.c.position)).all()
    for status in live:
        held = [row.rollout for row in rows if row.status == status]
        move(connection, "rollout", held, status, "held", now, why=why)
    reopen(connection, [row.group for row in rows if row.status in ("accepted", "batched")], now, why)
    by_submission: dict[str, list[str]] = {}
    for row in rows:
        by_submission.setdefault(row.submission, []).append(row.rollout)
    for submission, rollouts in by_submission.items():
        row = connection.execute(sa.select(SUBMISSIONS).where(SUBMISSIONS.c.submission == submission)).one()
        open_audit(connection, run_ctx, row, rollouts, "suspicion", now)
    return len(by_submission)


def hold_alike(connection: Connection, run_ctx: RunContext, profile: str, now: float) -> None:
    """Hold what was sent under a numerics profile that has become suspect."""
    sent = sa.select(SUBMISSIONS.c.submission).where(SUBMISSIONS.c.profile == profile)
    hold(connection, run_ctx, ROLLOUTS.c.submission.in_(sent), f"profile {profile} is suspect", now)


def _still_untrained(live: Sequence[str]) -> Any:
    """Rollouts that are not trained on, or dropped and paid for but lately, and under no audit yet."""
    looked_at = sa.or_(AUDITS.c.status.in_(("open", "claimed")), AUDITS.c.kind == "suspicion")
    known = sa.exists().where(AUDITS.c.submission == ROLLOUTS.c.submission, looked_at)
    paid = sa.and_(ROLLOUTS.c.status == "dropped", ROLLOUTS.c.escrow_step.is_not(None))
    return sa.or_(ROLLOUTS.c.status.in_(live), sa.and_(paid, ~known))


def void(connection: Connection, run_ctx: RunContext, audit: Row[Any], bad: Sequence[str], now: float) -> None:
    """A submission is void: its bad rollouts are rejected, the rest void with them, its pay is burned."""
    of_it = ROLLOUTS.c.submission == audit.submission
    query = sa.select(ROLLOUTS.c.rollout).where(of_it, ROLLOUTS.c.rollout.in_(bad), ROLLOUTS.c.status == "held")
    rejected = list(connection.execute(query).scalars())
    move(connection, "rollout", rejected, "held", "rejected", now, audit=audit.audit)
    void_rollouts(connection, run_ctx, of_it, audit.audit, now)


def void_rollouts(connection: Connection, run_ctx: RunContext, which: Any, cause: str, now: float) -> None:
    """Untrained rollouts are void, and the escrow for these and others is burned."""
    payment.burn(connection, run_ctx, which, now)
    withdraw(connection, which, cause, now)


def withdraw(connection: Connection, which: Any, cause: str, now: float) -> None:
    """Untrained rollouts are void, and their pay stays as it is; their samples are free again."""
    for status in ("held", "received", "accepted"):
        rows = connection.execute(sa.select(ROLLOUTS).where(which, ROLLOUTS.c.status == status)).all()
        move(connection, "rollout", [row.rollout for row in rows], status, "void", now, cause=cause)
        if status == "accepted":
            reopen(connection, [row.group for row in rows], now, "a sample was voided")


def cancel_audits(connection: Connection, which: Any, now: float, why: str) -> None:
    """Audits that wait or are under way are not wanted any more."""
    waiting = sa.select(AUDITS.c.audit, AUDITS.c.status).where(which, AUDITS.c.status.in_(("open", "claimed")))
    for row in connection.execute(waiting).all():
        move(connection, "audit", [row.audit], row.status, "cancelled", now, why=why)


def complete(connection: Connection, group: str, now: float) -> None:
    """Close an open group once all of its samples are accepted."""
    row = connection.execute(sa.select(GROUPS).where(GROUPS.c.group == group)).one()
    accepted = sa.and_(ROLLOUTS.c.group == group, ROLLOUTS.c.status == "accepted")
    rewards = list(connection.execute(sa.select(ROLLOUTS.c.reward).where(accepted)).scalars())
    if row.status != "open" or len(rewards) < row.samples:
        return
    connection.execute(
        GROUPS.update()
        .where(GROUPS.c.group == group)
        .values(reward=sum(rewards) / len(rewards), is_informative=is_informative(rewards))
    )
    move(connection, "group", [group], "open", "complete", now)


def reopen(connection: Connection, groups: Sequence[str], now: float, why: str) -> None:
    """Groups that were complete lack a sample again; what was batched with it waits for the next batch."""
    for status in ("complete", "batched"):
        query = sa.select(GROUPS.c.group).where(GROUPS.c.group.in_(groups), GROUPS.c.status == status)
        reopened = list(connection.execute(query).scalars())
        move(connection, "group", reopened, status, "open", now, why=why)
        siblings = sa.and_(ROLLOUTS.c.group.in_(reopened), ROLLOUTS.c.status == "batched")
        query = sa.select(ROLLOUTS.c.rollout).where(siblings)
        move(connection, "rollout", list(connection.execute(query).scalars()), "batched", "accepted", now, why=why)
        connection.execute(GROUPS.update().where(GROUPS.c.group.in_(reopened)).values(batch_step=None))


def eject(connection: Connection, run_ctx: RunContext, node: str, now: float) -> None:
    """All untrained work of the node is void, its leases go to others, its escrow to none."""
    query = sa.select(LEASES.c.lease).where(LEASES.c.node == node, LEASES.c.status == "open")
    end_leases(connection, list(connection.execute(query).scalars()), "void", now, why="the node was ejected")
    void_rollouts(connection, run_ctx, ROLLOUTS.c.node == node, f"ejection of {node}", now)
    cancel_audits(connection, AUDITS.c.node == node, now, "the node was ejected")
