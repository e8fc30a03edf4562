"""Coordinator: pay for rollouts into escrow, let that become credit, or burn it.

A rollout's `escrow_step` is the latest step when its pay went into escrow, and null while none of it is there. So a
node's escrow is the sum over these rollouts, and matured rows are found by an index, however long the run.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.store import ledger
from farflung.store.run import RunContext
from farflung.store.tables import AUDITS, NODES, ROLLOUTS, STEPS, UNDECIDED
from farflung.store.transitions import slices

FINAL = ("trained", "dropped")
"""Statuses of rollouts whose pay may mature: no tripwire has looked yet at those that wait for a batch."""


def pay(connection: Connection, run_ctx: RunContext, rows: Sequence[Row[Any]], now: float) -> None:
    """Put the tokens of rollouts that are not paid for yet into their nodes' escrow."""
    transfers = (ledger.Transfer(row.rollout, ledger.ISSUED, ledger.escrow(row.node), row.tokens) for row in rows)
    ledger.post(connection, transfers, run_ctx.run, now)
    for part in slices([row.rollout for row in rows]):
        connection.execute(_PAID, {"ids": part, "at": run_ctx.latest(connection).step})


_PAID = (
    ROLLOUTS.update()
    .where(ROLLOUTS.c.rollout.in_(sa.bindparam("ids", expanding=True)))
    .values(escrow_step=sa.bindparam("at"))
)


def burn(connection: Connection, run_ctx: RunContext, which: Any, now: float) -> None:
    """Burn the escrow of these rollouts; matured credit is the node's for good."""
    taken = _take(connection, which).all()
    transfers = (ledger.Transfer(row.rollout, ledger.escrow(row.node), ledger.BURNED, row.tokens) for row in taken)
    ledger.post(connection, transfers, run_ctx.run, now)


def mature(connection: Connection, run_ctx: RunContext, now: float) -> None:
    """Escrow paid `mature_steps` commits ago becomes credit, where the rollout has come to its end.

    Not while an audit of the submission is undecided, nor while one of the node's is that was opened before the last of
    these payments: a verdict may burn them.
    """
    latest = run_ctx.latest(connection).step
    due = latest - run_ctx.config.coordinator.mature_steps
    next_step = sa.and_(STEPS.c.run == run_ctx.run, STEPS.c.step == min(due + 1, latest))
    paid_until = sa.select(STEPS.c.committed_at).where(next_step).scalar_subquery()
    undecided = sa.and_(AUDITS.c.run == run_ctx.run, sa.text(UNDECIDED))
    ripe = sa.and_(
        ROLLOUTS.c.run == run_ctx.run,
        ROLLOUTS.c.escrow_step <= due,
        ROLLOUTS.c.status.in_(FINAL),
        ROLLOUTS.c.submission.not_in(sa.select(AUDITS.c.submission).where(undecided)),
        ROLLOUTS.c.node.not_in(sa.select(AUDITS.c.node).where(undecided, AUDITS.c.opened_at <= paid_until)),
    )
    _credit(connection, run_ctx, _take(connection, ripe), f"{run_ctx.run}-step-{due}", now)


def settle(connection: Connection, run_ctx: RunContext, now: float) -> None:
    """The run is over: all that is in escrow of nodes that were not ejected is theirs."""
    good = sa.select(NODES.c.node).where(NODES.c.status != "ejected")
    mine = sa.and_(ROLLOUTS.c.run == run_ctx.run, ROLLOUTS.c.escrow_step.is_not(None), ROLLOUTS.c.node.in_(good))
    _credit(connection, run_ctx, _take(connection, mine), f"end of {run_ctx.run}", now)


def _take(connection: Connection, which: Any) -> Any:
    """Rollouts among these whose pay is in escrow, which it leaves."""
    in_escrow = sa.and_(which, ROLLOUTS.c.escrow_step.is_not(None))
    taken = ROLLOUTS.update().where(in_escrow).values(escrow_step=None)
    return connection.execute(taken.returning(ROLLOUTS.c.rollout, ROLLOUTS.c.node, ROLLOUTS.c.tokens))


def _credit(connection: Connection, run_ctx: RunContext, rows: Iterable[Row[Any]], cause: str, now: float) -> None:
    owed: Counter[str] = Counter()
    for row in rows:
        owed[row.node] += row.tokens
    transfers = [
        ledger.Transfer(cause, ledger.escrow(n), ledger.credit(n), tokens) for n, tokens in sorted(owed.items())
    ]
    ledger.post(connection, transfers, run_ctx.run, now)
