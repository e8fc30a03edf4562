"""Coordinator: forget keys that took a lease and handed nothing in; their rows would grow for ever.

Only leases that lapsed or were handed back, of nodes that never had a receipt: those rows prove nothing, and no node
has a claim to them. The leases of others stay, with their stories.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.store.run import RunContext
from farflung.store.tables import EVENTS, LEASES, NODES, ROLLOUT_COUNTS, ROLLOUTS

AT_ONCE = 200
"""Leases that one transaction forgets, so that no other change waits long behind it."""
SILENT_S = 3600.0
"""A key that handed nothing in and has been silent for so long has to register again."""


def forget(connection: Connection, run_ctx: RunContext, now: float) -> int:
    """Forget up to AT_ONCE leases that came to nothing, then as many nodes; gives how many rows of both."""
    mine = sa.and_(LEASES.c.run == run_ctx.run, LEASES.c.status.in_(("returned", "expired")))
    mine = sa.and_(mine, LEASES.c.opened_at < now - 3 * run_ctx.config.deadline_s)
    query = sa.select(LEASES.c.lease).join(NODES, NODES.c.node == LEASES.c.node).where(mine, *_never_paid(run_ctx))
    leases = list(connection.execute(query.limit(AT_ONCE)).scalars())
    rollouts = list(connection.execute(sa.select(ROLLOUTS.c.rollout).where(ROLLOUTS.c.lease.in_(leases))).scalars())
    _delete(connection, ROLLOUTS.c.rollout, rollouts)
    _delete(connection, LEASES.c.lease, leases)
    return len(leases) + (0 if leases else _forget_nodes(connection, run_ctx, now))


def _never_paid(run_ctx: RunContext) -> Sequence[sa.ColumnElement[bool]]:
    return NODES.c.status == "probation", NODES.c.receipt == "", NODES.c.node.not_in(run_ctx.granted)


def _forget_nodes(connection: Connection, run_ctx: RunContext, now: float) -> int:
    has_lease = sa.select(LEASES.c.lease).where(LEASES.c.node == NODES.c.node).exists()
    silent = NODES.c.seen_at < now - SILENT_S
    query = sa.select(NODES.c.node).where(silent, *_never_paid(run_ctx), ~has_lease)
    nodes = list(connection.execute(query.limit(AT_ONCE)).scalars())
    _delete(connection, NODES.c.node, nodes)
    connection.execute(ROLLOUT_COUNTS.delete().where(ROLLOUT_COUNTS.c.node.in_(nodes)))  # all of them are 0
    return len(nodes)


def _delete(connection: Connection, key: sa.Column[str], ids: Sequence[str]) -> None:
    """Rows by their key, and their stories."""
    if ids:
        connection.execute(key.table.delete().where(key.in_(ids)))
        connection.execute(EVENTS.delete().where(EVENTS.c.subject.in_(ids)))
