"""Coordinator: how much of the work nodes on probation may hold, all of them together."""

import math

import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.store.run import RunContext
from farflung.store.tables import AUDITS, LEASES, NODES, ROLLOUTS
from farflung.tasks.assign import Plan

COOL_S = 30.0


class Probation:
    """The slots for nodes on probation: few, and shared by all new keys, so ten thousand of them slow only each other.

    A node that holds a lease or waits for a replay has one, whatever role it took since, and for COOL_S after it let a
    lease go: keys that come, take one and hand it back would fill the database. While a trusted node is here,
    new keys get no lease once they hold samples of half of the groups ahead: a group waits for all of its samples.
    """

    def __init__(self, connection: Connection, run_ctx: RunContext, groups_ahead: int, now: float) -> None:
        self._trust = run_ctx.config.trust
        since = now - run_ctx.config.lease.lost_s
        is_guarded = connection.execute(_ANY_TRUSTED, {"since": since}).first() is not None
        self._most = groups_ahead / 2 if is_guarded else math.inf
        self._groups = (
            set(connection.execute(_IN_NEW_HANDS, {"of": run_ctx.run}).scalars()) if is_guarded else set[str]()
        )
        waiting = (
            sa.select(AUDITS.c.node, sa.func.count())
            .join(NODES, NODES.c.node == AUDITS.c.node)
            .where(AUDITS.c.run == run_ctx.run, AUDITS.c.status.in_(("open", "claimed")), NODES.c.status == "probation")
            .group_by(AUDITS.c.node)
        )
        leased = (
            sa.select(LEASES.c.node)
            .join(NODES, NODES.c.node == LEASES.c.node)
            .where(LEASES.c.run == run_ctx.run, LEASES.c.status == "open", NODES.c.status == "probation")
            .where(LEASES.c.purpose == "train")
        )
        left = connection.execute(_LEFT, {"of": run_ctx.run, "since": now - COOL_S}).scalars()
        self._waiting: dict[str, int] = {row[0]: row[1] for row in connection.execute(waiting)}
        self._taken = {*self._waiting, *connection.execute(leased).scalars(), *left}

    def why_not(self, node: str) -> str:
        """Why a node on probation has to wait, or nothing: until its own last work is replayed, and for a slot."""
        if self._waiting.get(node, 0) >= self._trust.probation_waiting:
            return f"node {node} is on probation and its submissions wait for their replay"
        if node not in self._taken and len(self._taken) >= self._trust.probation_slots:
            most = self._trust.probation_slots
            return f"{len(self._taken)} nodes on probation work or wait for their replays; {most} may at a time"
        if len(self._groups) >= self._most:
            return f"nodes on probation have samples of {len(self._groups)} groups, half of what may be under way"
        return ""

    def take(self, node: str, plan: Plan) -> None:
        """A node on probation is leased this."""
        self._taken.add(node)
        self._groups |= {str(share.group) for share in plan.shares}


_ANY_TRUSTED = (
    sa.select(NODES.c.node)
    .where(NODES.c.status == "trusted", NODES.c.role == "worker", NODES.c.seen_at > sa.bindparam("since"))
    .limit(1)
)
_LEFT = (
    sa.select(LEASES.c.node)
    .join(NODES, NODES.c.node == LEASES.c.node)
    .where(LEASES.c.run == sa.bindparam("of"), LEASES.c.opened_at > sa.bindparam("since"))
    .where(LEASES.c.status.in_(("returned", "expired")), NODES.c.status == "probation", NODES.c.receipt == "")
)
_IN_NEW_HANDS = (
    sa.select(ROLLOUTS.c.group)
    .join(NODES, NODES.c.node == ROLLOUTS.c.node)
    .where(ROLLOUTS.c.run == sa.bindparam("of"), ROLLOUTS.c.status.in_(("leased", "held")))
    .where(NODES.c.status == "probation", NODES.c.role != "validator")
    .distinct()
)
