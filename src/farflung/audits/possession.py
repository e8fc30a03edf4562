"""Coordinator: does an engine hold the weights it was told to compute with? A missed update is named, not punished."""

import logging
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.audits.audit import audit_nonce
from farflung.protocol import probe
from farflung.protocol.messages import Evidence, Lease
from farflung.store.run import RunContext, node_row
from farflung.store.tables import AUDITS, LEASES, STEPS
from farflung.store.transitions import end_leases, memo, move, record
from farflung.trust.evidence import Profiles

log = logging.getLogger(__name__)


def of_submission(
    connection: Connection,
    run_ctx: RunContext,
    profiles: Profiles,
    sender: Row[Any],
    lease: Lease,
    shown: str,
    now: float,
) -> str:
    """The fault of the weights behind a submission, or nothing. The lease of a wrong one goes to others."""
    if not profiles.of(sender.profile).holds_published:
        return ""
    wrong = _compare(connection, run_ctx, lease.step, lease.nonce, shown)
    if not wrong:
        return ""
    node = sender.node
    why = f"node {node} computed lease {lease.lease} of step {lease.step} {wrong}"
    if _is_open(connection, lease.lease):
        end_leases(connection, [lease.lease], "returned", now, why=why, node=node)
        warn(connection, node, why, now)
    return why


def of_evidence(connection: Connection, run_ctx: RunContext, validator: str, evidence: Evidence, now: float) -> str:
    """The same for a validator: an audit that it answered under other weights is open again, for anybody."""
    audit = connection.execute(sa.select(AUDITS).where(AUDITS.c.audit == evidence.audit)).first()
    if audit is None or audit.status != "claimed" or audit.claimed_by != validator:
        return ""
    wrong = _compare(connection, run_ctx, audit.step, audit_nonce(audit.audit), evidence.possession)
    if not wrong:
        return ""
    why = f"validator {validator} replayed audit {audit.audit} of step {audit.step} {wrong}"
    move(connection, "audit", [audit.audit], "claimed", "open", now, why=why)
    warn(connection, validator, why, now)
    return why


_PROBE = sa.select(STEPS.c.probe, STEPS.c.probe_before).where(
    STEPS.c.run == sa.bindparam("of"), STEPS.c.step == sa.bindparam("at")
)


def _compare(connection: Connection, run_ctx: RunContext, step: int, nonce: str, sent: str) -> str:
    this = {"of": run_ctx.run, "at": step}
    row = memo(connection, ("probe", run_ctx.run, step), lambda: connection.execute(_PROBE, this).one())
    if not row.probe or sent == probe.answer(nonce, row.probe):
        return ""
    if not sent:
        return "without showing possession of any weights"
    if row.probe_before and sent == probe.answer(nonce, row.probe_before):
        return f"with the weights of step {step - 1}: a weight update was missed"
    return "with weights that are neither of this step nor of the one before"


def _is_open(connection: Connection, lease: str) -> bool:
    return connection.execute(sa.select(LEASES.c.status).where(LEASES.c.lease == lease)).scalar() == "open"


def warn(connection: Connection, node: str, why: str, now: float) -> None:
    """Tell the operator, and readers of the node's story."""
    status = node_row(connection, node).status
    record(connection, "node", [node], status, status, now, warning=why)
    log.warning("%s", why)
