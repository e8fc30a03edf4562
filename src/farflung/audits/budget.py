"""Coordinator: how much of trusted nodes' work can be audited for the operator's budget.

Both costs are measured on the operator's own validators, which replay and, when no audit waits, generate: no number of
a worker's is in it. They are seconds of accelerators where a validator has one, of its processor else.
"""

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.audits import breaker, node_record
from farflung.protocol.messages import Heartbeat
from farflung.store.run import RunContext
from farflung.store.tables import NODES
from farflung.store.transitions import memo
from farflung.trust.audit_policy import affordable, audit_probability
from farflung.trust.record import NodeRecord


def probability(connection: Connection, run_ctx: RunContext, record: NodeRecord, profile: str, now: float) -> float:
    """The audit probability of a submission of a node with this record and numerics profile, now: 1 while the verifier
    is in doubt about such nodes, so that good ones vouch for it soon, or fail as well."""
    if breaker.doubt(connection, run_ctx, now).is_of(profile):
        return 1.0
    affordable_ = memo(connection, "afford", lambda: afford(connection, run_ctx))
    return audit_probability(record, node_record.settings(run_ctx), affordable_)


def afford(connection: Connection, run_ctx: RunContext) -> float:
    """The audit probability that the budget affords, by what validators measured."""
    validators = [node for node, role in run_ctx.granted.items() if role == "validator"]
    rows = connection.execute(_HEARTBEATS, {"ids": validators})
    heartbeats = [msgspec.msgpack.decode(heartbeat, type=Heartbeat) for heartbeat in rows.scalars()]
    audited = sum(one.recent_tokens for one in heartbeats)
    made = sum(one.made_tokens for one in heartbeats)
    if not audited or not made:
        return 1.0
    core_s = run_ctx.config.prices.core_s
    audit_s = sum(core_s(one.recent_cpu_s, one.recent_device_s) for one in heartbeats) / audited
    generate_s = sum(core_s(one.made_cpu_s, one.made_device_s) for one in heartbeats) / made
    return affordable(run_ctx.config.trust.audit_budget, audit_s, generate_s)


_HEARTBEATS = sa.select(NODES.c.heartbeat).where(
    NODES.c.node.in_(sa.bindparam("ids", expanding=True)),  # all nodes by role would be a scan in every transaction
    NODES.c.role == "validator",
    NODES.c.heartbeat != b"",
)
