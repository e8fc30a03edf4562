"""Coordinator: stop verdicts and training where the verifier is suspect, not the nodes that it condemns.

Two things say so (docs/decisions/0052): verifiers disagree about the same text, or nearly all of the work with a good
record fails at one step. Until others pass, ejections wait; everything else goes on, for cheats fail together too.

Where that is the work under one numerics profile and others pass, its machines are suspect: it is open for that profile
alone (docs/decisions/0071), whose nodes get no work and are not ejected.
"""

import json
import logging
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.audits import node_record
from farflung.store.run import RunContext, node_rows
from farflung.store.tables import AUDITS, NODES, RUNS, SUBMISSIONS, VERDICTS
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


def check(connection: Connection, run_ctx: RunContext, step: int, profile: str, now: float) -> bool:
    """Open the circuit breaker if nearly all of the work with a good record failed at a step; log a step in doubt.

    Gives whether it was opened for this profile alone, under which the last failure was.
    """
    trust, found = run_ctx.config.trust, poll(connection, run_ctx, step, now)
    share, least = trust.breaker_share, trust.breaker_nodes
    if is_breaker_due(found, share, least):
        why = f"{_failures(found, step)}: the validators or the weights are suspect"
        _open(connection, run_ctx, why, now)
        return False
    if found.nodes == least and is_doubtful(found, share, least):
        log.warning("%d nodes with a good record failed at step %d; ejections wait for others", found.nodes, step)
    alike = poll(connection, run_ctx, step, now, profile) if found.nodes >= least else Poll(0)
    is_due = is_breaker_due(alike, share, least) and profile not in run_ctx.suspect_profiles(connection)
    if is_due:
        _open_for(connection, run_ctx, profile, _failures(alike, step), now)
    return is_due


def _failures(found: Poll, step: int) -> str:
    return (
        f"{found.nodes} nodes that did {found.failed_share:.0%} of the work with a good record failed verification "
        f"at step {step}"
    )


def disagree(connection: Connection, run_ctx: RunContext, step: int, now: float) -> None:
    """A second opinion found honest text where the first found a cheat's: once too often at a step, and the
    circuit breaker opens."""
    cleared = len(_nodes(connection, run_ctx, step, ("release",)))
    if cleared >= DISAGREED:
        why = f"verifiers disagree about {cleared} nodes at step {step}: one of them is broken"
        _open(connection, run_ctx, why, now)


class Doubt(NamedTuple):
    """The verifier is in doubt about all nodes, or about those under some numerics profiles."""

    is_of_all: bool
    profiles: frozenset[str]

    def is_of(self, profile: str) -> bool:
        """Whether it is about nodes under this profile."""
        return self.is_of_all or profile in self.profiles


def doubt(connection: Connection, run_ctx: RunContext, now: float) -> Doubt:
    """So many good nodes failed at a step that is still trained on, and so few passed since, that no node is to be
    ejected yet and all that good nodes send is to be audited. Asked once in a shared transaction."""
    return memo(connection, ("doubt", run_ctx.run), lambda: _doubt(connection, run_ctx, now))


def _doubt(connection: Connection, run_ctx: RunContext, now: float) -> Doubt:
    latest = run_ctx.latest(connection)
    oldest = latest.step - run_ctx.config.learn.max_staleness
    query = sa.select(VERDICTS.c.step, VERDICTS.c.profile).where(*_failed(run_ctx, FAILED), VERDICTS.c.step >= oldest)
    failed = connection.execute(query.distinct()).all() if latest.status == "running" else []
    return Doubt(
        any(_is_doubtful(connection, run_ctx, step, now) for step in {row.step for row in failed}),
        frozenset(row.profile for row in failed if _is_doubtful(connection, run_ctx, row.step, now, row.profile)),
    )


def _is_doubtful(
    connection: Connection, run_ctx: RunContext, step: int, now: float, profile: str | None = None
) -> bool:
    trust = run_ctx.config.trust
    return is_doubtful(poll(connection, run_ctx, step, now, profile), trust.breaker_share, trust.breaker_nodes)


def spares(connection: Connection, run_ctx: RunContext, now: float) -> sa.ColumnElement[bool] | None:
    """Audits of nodes that are not to be ejected now; None where there are no such nodes."""
    found = doubt(connection, run_ctx, now)
    if found.is_of_all:
        return sa.true()
    profiles = found.profiles | run_ctx.suspect_profiles(connection).keys()
    sent = sa.exists().where(SUBMISSIONS.c.submission == AUDITS.c.submission, SUBMISSIONS.c.profile.in_(profiles))
    return sent if profiles else None


def poll(connection: Connection, run_ctx: RunContext, step: int, now: float, profile: str | None = None) -> Poll:
    """How many nodes failed at a step, and their work beside that of nodes that passed since or were not looked at; of
    those under one profile, if it is named."""
    failed = _nodes(connection, run_ctx, step, FAILED, profile)
    if len(failed) < run_ctx.config.trust.breaker_nodes:
        return Poll(len(failed))
    passed = _passed_since(connection, run_ctx, step, failed, profile)
    present = _PRESENT if profile is None else _PRESENT.where(NODES.c.profile == profile)
    here = connection.execute(present, {"since": now - run_ctx.config.lease.lost_s}).scalars()
    unknown = set(here) - failed - passed
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


def _nodes(
    connection: Connection, run_ctx: RunContext, step: int, outcomes: Collection[str], profile: str | None = None
) -> set[str]:
    query = sa.select(VERDICTS.c.node).where(*_failed(run_ctx, outcomes), VERDICTS.c.step == step)
    query = query if profile is None else query.where(VERDICTS.c.profile == profile)
    return set(connection.execute(query.distinct()).scalars())


def _passed_since(
    connection: Connection, run_ctx: RunContext, step: int, failed: Collection[str], profile: str | None
) -> set[str]:
    """Other nodes, new ones too, with work that came no sooner than the first that failed, and that passed."""
    bad = sa.and_(AUDITS.c.node.in_(failed), AUDITS.c.step == step, AUDITS.c.outcome.in_(FAILED))
    first = sa.select(sa.func.min(AUDITS.c.opened_at)).where(bad).scalar_subquery()
    later = sa.and_(AUDITS.c.run == run_ctx.run, AUDITS.c.status == "done", AUDITS.c.step >= step)
    passed = sa.select(AUDITS.c.node).where(later, AUDITS.c.outcome == "ok", AUDITS.c.opened_at >= first)
    if profile is not None:
        sent = SUBMISSIONS.c.submission == AUDITS.c.submission
        passed = passed.join(SUBMISSIONS, sent).where(SUBMISSIONS.c.profile == profile)
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
    """The operator has looked: go on, and count afresh, for all profiles. Gives 0 if it was closed."""
    if not is_open(connection, run_ctx) and not run_ctx.suspect_profiles(connection):
        return 0
    last = sa.select(sa.func.coalesce(sa.func.max(VERDICTS.c.id), 0)).scalar_subquery()
    closed = {"breaker": "", "breaker_profiles": "{}", "breaker_after": last}
    _write(connection, run_ctx, now, "the circuit breaker was closed", **closed)
    return 1


def _open(connection: Connection, run_ctx: RunContext, why: str, now: float) -> None:
    why += "; no node is ejected and nothing trained on until you say farflung breaker --close"
    _write(connection, run_ctx, now, why, breaker=why)
    log.error("circuit breaker open run=%s because=%s", run_ctx.run, why)


def _open_for(connection: Connection, run_ctx: RunContext, profile: str, why: str, now: float) -> None:
    """Machines whose arithmetic has changed, or cheats that say they are of one kind: they earn nothing meanwhile."""
    why += (
        f", others did not: profile {profile or 'of the run'!r} no longer fits its machines, or they cheat together; "
        "its nodes get no work and none is ejected until you say farflung breaker --close"
    )
    found = run_ctx.suspect_profiles(connection) | {profile: why}
    _write(connection, run_ctx, now, why, breaker_profiles=json.dumps(found))
    log.error("circuit breaker open run=%s profile=%s because=%s", run_ctx.run, profile, why)


def _write(connection: Connection, run_ctx: RunContext, now: float, warning: str, **values: Any) -> None:
    status = run_ctx.status(connection)
    connection.execute(RUNS.update().where(RUNS.c.run == run_ctx.run).values(**values))
    record(connection, "run", [run_ctx.run], status, status, now, warning=warning)
