"""Coordinator: settle work that no step will train on. It is paid for, so it is looked at.

The tripwire replays what is trained on. Of the rest, of all that a submission has among what is let go together, one
rollout is replayed, drawn by a key that its node did not know. Work of which a share f is made up is paid for with
probability 1 - f, which is what the computed share is worth: garbage gains nothing, even before what a verdict takes
(docs/decisions/0051-paid-for-what-is-looked-at.md).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.audits.audit import Drawn, open_audits
from farflung.protocol import seeds
from farflung.store import payment
from farflung.store.evaluations import HELD_OUT
from farflung.store.run import RunContext
from farflung.store.tables import AUDITS, GROUPS, ROLLOUTS
from farflung.store.transitions import move

ENDS = (("leased", "expired"), ("held", "dropped"), ("received", "dropped"), ("accepted", "dropped"))
"""State before → after of the rollouts of a group that is let go."""


def drop_groups(
    connection: Connection,
    run_ctx: RunContext,
    groups: Sequence[str],
    now: float,
    why: str,
    *,
    is_looked_at: bool = False,
) -> None:
    """Let go of groups that will not be trained on, with all that is under way for them.

    Rollouts handed in are paid for, scored or not, and looked at, unless the tripwire does that (`is_looked_at`).
    """
    for status in ("open", "complete"):
        query = sa.select(GROUPS.c.group).where(GROUPS.c.group.in_(groups), GROUPS.c.status == status)
        move(connection, "group", list(connection.execute(query).scalars()), status, "dropped", now, why=why)
    of_these = ROLLOUTS.c.group.in_(groups)
    _pay_unscored(connection, run_ctx, of_these, now)
    if not is_looked_at:
        inspect(connection, run_ctx, sa.and_(of_these, ROLLOUTS.c.status.in_(("received", "accepted"))), now)
    for status, after in ENDS:
        query = sa.select(ROLLOUTS.c.rollout).where(of_these, ROLLOUTS.c.status == status)
        move(connection, "rollout", list(connection.execute(query).scalars()), status, after, now, why=why)


def _pay_unscored(connection: Connection, run_ctx: RunContext, which: Any, now: float) -> None:
    query = sa.select(ROLLOUTS).join(GROUPS, GROUPS.c.group == ROLLOUTS.c.group)
    mine = sa.and_(which, ROLLOUTS.c.status == "received", GROUPS.c.purpose.not_in(HELD_OUT))
    payment.pay(connection, run_ctx, connection.execute(query.where(mine)).all(), now)


def inspect(connection: Connection, run_ctx: RunContext, which: Any, now: float) -> int:
    """Open audits of one paid rollout of each submission among these; gives how many. A submission is in the test's
    count once, so further audits of one count as suspicion."""
    rows = connection.execute(
        sa.select(ROLLOUTS, GROUPS.c.step)
        .join(GROUPS, GROUPS.c.group == ROLLOUTS.c.group)
        .where(which, ROLLOUTS.c.escrow_step.is_not(None))
        .order_by(ROLLOUTS.c.group, ROLLOUTS.c.sample)
    ).all()
    drawn = {row.submission: _drawn(row) for row in one_of_each(run_ctx, rows) if not row.is_audited}
    query = sa.select(AUDITS.c.submission).where(AUDITS.c.submission.in_(list(drawn)), AUDITS.c.kind == "draw")
    counted = set(connection.execute(query).scalars()) if drawn else set[str]()
    for kind, is_counted in (("draw", False), ("suspicion", True)):
        some = [one for submission, one in drawn.items() if (submission in counted) is is_counted]
        open_audits(connection, run_ctx, some, kind, now)
    return len(drawn)


def one_of_each(run_ctx: RunContext, rows: Iterable[Row[Any]]) -> list[Row[Any]]:
    """Of the rollouts of each submission one, drawn by the audit key of their policy's step."""
    return draw_one_of_each(rows, lambda step: seeds.audit_key(run_ctx.step_secret(step)))


def draw_one_of_each(rows: Iterable[Any], key_of: Callable[[int], bytes]) -> list[Any]:
    """The same, given the keys. Each of n is drawn with probability 1/n."""
    parts: dict[str, list[Any]] = {}
    for row in rows:
        parts.setdefault(row.submission, []).append(row)
    return [part[_index(key_of(part[0].step), part[0].group, of, len(part))] for of, part in parts.items()]


def _index(key: bytes, group: str, submission: str, size: int) -> int:
    return int.from_bytes(seeds.derive(key, "one of a part", group, submission)[:8], "big") % size


def _drawn(row: Row[Any]) -> Drawn:
    return Drawn(row.submission, row.lease, row.node, [row.rollout], row.step, row.tokens)
