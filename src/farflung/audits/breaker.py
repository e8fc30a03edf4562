"""Coordinator: stop verdicts and training where the verifier is suspect, not the nodes that it condemns.

Two things say so (docs/decisions/0052): verifiers disagree about the same text, or nearly all of the work with a good
record fails at one step. Until others pass, ejections wait; everything else goes on, for cheats fail together too.
"""

import logging
from collections.abc import Collection, Iterable

import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.audits import node_record
from farflung.store.run import RunContext, node_rows
from farflung.store.tables import AUDITS, NODES, RUNS, VERDICTS
from farflung.store.transitions import memo, record
from farflung.trust.audit_policy import Poll, is_breaker_due, is_doubtful

log = logging.getLogger(__name__)
FAILED = ("void", "quarantine")
DISAGREED = 2
"""Nodes that a second opinion has to clear at one step: one may be a bit that flipped in one replay."""


def reason(connection: Connection, run: str) -> str:
    """Why the circuit breaker is open, empty if it is closed."""
    return connection.execute(sa.select(RUNS.c.breaker).where(RUNS.c.run == run)).scalar_one()


def is_open(connection: Connection, run_ctx: RunContext) -> bool:
    """Whether verdicts and training are held."""
    return bool(reason(connection, run_ctx.run))


def check(connection: Connection, run_ctx: RunContext, step: int, now: float) -> None:
    """Open the circuit breaker if nearly all of the work with a good record failed at a step; log a step in doubt."""
    trust, found = run_ctx.config.trust, poll(connection, run_ctx, step, now)
    if is_breaker_due(found, trust.breaker_share, trust.breaker_nodes):
        why = (
            f"{found.nodes} nodes that did {found.failed_share:.0%} of the work with a good record failed verification "
            f"at step {step}: the validators or the weights are suspect"
        )
        _open(connection, run_ctx, why, now)
    elif found.nodes == trust.breaker_nodes and is_doubtful(found, trust.breaker_share, trust.breaker_nodes):
        log.warning("%d nodes with a good record failed at step %d; ejections wait for others", found.nodes, step)


def disagree(connection: Connection, run_ctx: RunContext, step: int, now: float) -> None:
    """A second opinion found honest text where the first found a cheat's: once too often at a step, and the
    circuit breaker opens."""
    cleared = len(_nodes(connection, run_ctx, step, ("release",)))
    if cleared >= DISAGREED:
        why = f"verifiers disagree about {cleared} nodes at step {step}: one of them is broken"
        _open(connection, run_ctx, why, now)


def is_in_doubt(connection: Connection, run_ctx: RunContext, now: float) -> bool:
    """Whether so many good nodes failed at a step that is still trained on, and so few passed since, that no node is to
    be ejected yet and all that good nodes send is to be audited. Asked once in a shared transaction."""
    return memo(connection, ("doubt", run_ctx.run), lambda: _is_in_doubt(connection, run_ctx, now))


def _is_in_doubt(connection: Connection, run_ctx: RunContext, now: float) -> bool:
    latest, trust = run_ctx.latest(connection), run_ctx.config.trust
    oldest = latest.step - run_ctx.config.learn.max_staleness
    query = sa.select(VERDICTS.c.step).where(*_failed(run_ctx, FAILED), VERDICTS.c.step >= oldest).distinct()
    steps = list(connection.execute(query).scalars()) if latest.status == "running" else []
    return any(is_doubtful(poll(connection, run_ctx, s, now), trust.breaker_share, trust.breaker_nodes) for s in steps)


def poll(connection: Connection, run_ctx: RunContext, step: int, now: float) -> Poll:
    """How many nodes failed at a step, and their work beside that of nodes that passed since or were not looked at."""
    failed = _nodes(connection, run_ctx, step, FAILED)
    if len(failed) < run_ctx.config.trust.breaker_nodes:
        return Poll(len(failed))
    passed = _passed_since(connection, run_ctx, step, failed)
    unknown = (
        set(connection.execute(_PRESENT, {"since": now - run_ctx.config.lease.lost_s}).scalars()) - failed - passed
    )
    work = _work(connection, failed | passed | unknown)
    return Poll(len(failed), *(sum(work[node] for node in some) for some in (failed, passed, unknown)))


_PRESENT = sa.select(NODES.c.node).where(
    NODES.c.status == "trusted", NODES.c.role == "worker", NODES.c.seen_at > sa.bindparam("since")
)


def _failed(run_ctx: RunContext, outcomes: Collection[str]) -> tuple[sa.ColumnElement[bool], ...]:
    """Verdicts on nodes with a good record since the circuit breaker was last closed."""
    since = sa.select(RUNS.c.breaker_after).where(RUNS.c.run == run_ctx.run).scalar_subquery()
    mine = VERDICTS.c.run == run_ctx.run, VERDICTS.c.outcome.in_(outcomes), VERDICTS.c.id > since
    return (*mine, VERDICTS.c.was_trusted) if outcomes is FAILED else mine


def _nodes(connection: Connection, run_ctx: RunContext, step: int, outcomes: Collection[str]) -> set[str]:
    query = sa.select(VERDICTS.c.node).where(*_failed(run_ctx, outcomes), VERDICTS.c.step == step)
    return set(connection.execute(query.distinct()).scalars())


def _passed_since(connection: Connection, run_ctx: RunContext, step: int, failed: Collection[str]) -> set[str]:
    """Other nodes, new ones too, with work that came no sooner than the first that failed, and that passed."""
    bad = sa.and_(AUDITS.c.node.in_(failed), AUDITS.c.step == step, AUDITS.c.outcome.in_(FAILED))
    first = sa.select(sa.func.min(AUDITS.c.opened_at)).where(bad).scalar_subquery()
    later = sa.and_(AUDITS.c.run == run_ctx.run, AUDITS.c.status == "done", AUDITS.c.step >= step)
    passed = sa.select(AUDITS.c.node).where(later, AUDITS.c.outcome == "ok", AUDITS.c.opened_at >= first)
    return set(connection.execute(passed.distinct()).scalars()) - set(failed)


def _work(connection: Connection, nodes: Iterable[str]) -> dict[str, int]:
    """Verified tokens of each node: those that were audited, less those of audits that failed."""
    rows = node_rows(connection, nodes)
    query = sa.select(AUDITS.c.node, sa.func.sum(AUDITS.c.tokens)).where(
        AUDITS.c.node.in_(rows), AUDITS.c.outcome.in_((*FAILED, "eject"))
    )
    bad: dict[str, int] = {row[0]: row[1] for row in connection.execute(query.group_by(AUDITS.c.node))}
    return {node: max(0, node_record.read(row).audited_tokens - bad.get(node, 0)) for node, row in rows.items()}


def close(connection: Connection, run_ctx: RunContext, now: float) -> int:
    """The operator has looked: go on, and count afresh. Gives 0 if it was closed."""
    if not is_open(connection, run_ctx):
        return 0
    last = sa.select(sa.func.coalesce(sa.func.max(VERDICTS.c.id), 0)).scalar_subquery()
    connection.execute(RUNS.update().where(RUNS.c.run == run_ctx.run).values(breaker_after=last))
    _set(connection, run_ctx, "", now)
    return 1


def _open(connection: Connection, run_ctx: RunContext, why: str, now: float) -> None:
    why += "; no node is ejected and nothing trained on until you say farflung breaker --close"
    _set(connection, run_ctx, why, now)
    log.error("circuit breaker open run=%s because=%s", run_ctx.run, why)


def _set(connection: Connection, run_ctx: RunContext, why: str, now: float) -> None:
    status = run_ctx.status(connection)
    connection.execute(RUNS.update().where(RUNS.c.run == run_ctx.run).values(breaker=why))
    record(connection, "run", [run_ctx.run], status, status, now, warning=why or "the circuit breaker was closed")
