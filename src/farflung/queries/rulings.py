"""Verdicts as a node's owner is told them: at once that there is one, details once its step is closed. Read only.

Which rollout and how many tokens gave it away would teach a cheat how far it may go while it can still go there.
"""

from collections.abc import Collection
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.audits import node_record
from farflung.protocol.messages import Ruling
from farflung.queries import views
from farflung.queries.redact import Redaction, redaction_of
from farflung.store.run import RunContext
from farflung.store.tables import AUDITS, VERDICTS
from farflung.trust.record import NodeRecord, needed

LATEST = 8
"""Verdicts on one node that a heartbeat's answer names."""
SHORT = {
    "void": "a replay finds tokens that its seeds, weights and profile do not give",
    "quarantine": "replays of several submissions find tokens that their seeds, weights and profile do not give",
    "eject": "replays of several submissions find tokens that their seeds, weights and profile do not give",
    "release": "the evidence is not enough",
}
"""The reason as long as the step can still be trained on."""


def progress(run_ctx: RunContext, node: Row[Any]) -> tuple[int, int]:
    """Clean rollouts in a row and how many end probation, (0, 0) for a node of which no trust is kept.

    Of a trusted node no count: it would tell which of its submissions were audited.
    """
    record: NodeRecord = node_record.read(node)
    if node.role != "worker":
        return 0, 0
    clean = record.clean_rollouts if node.status == "probation" else 0
    return clean, needed(record, node_record.settings(run_ctx))


def rulings(connection: Connection, run_ctx: RunContext, nodes: Collection[Row[Any]]) -> dict[str, list[Ruling]]:
    """The latest verdicts on each of these nodes, oldest first; most nodes have none, and are not looked for."""
    blamed = [n.node for n in nodes if n.status in ("quarantined", "ejected") or node_record.read(n).bad_submissions]
    if not blamed:
        return {}
    redaction, found = redaction_of(connection, run_ctx.config), dict[str, list[Ruling]]()
    for node in blamed:
        mine = sa.select(VERDICTS).where(VERDICTS.c.run == run_ctx.run, VERDICTS.c.node == node)
        rows = connection.execute(mine.order_by(VERDICTS.c.id.desc()).limit(LATEST)).all()
        found[node] = [_ruling(connection, row, redaction) for row in reversed(rows)]
    return found


def _ruling(connection: Connection, row: Row[Any], redaction: Redaction) -> Ruling:
    verdict = views.open_verdict(row.document)
    query = sa.select(AUDITS.c.submission).where(AUDITS.c.audit == verdict.audit)
    is_open = redaction.since is not None and row.step >= redaction.since
    return Ruling(
        id=row.id,
        outcome=verdict.outcome,
        submission=connection.execute(query).scalar() or "",
        reason=SHORT[verdict.outcome] if is_open else verdict.reason,
        at=verdict.decided_at,
    )
