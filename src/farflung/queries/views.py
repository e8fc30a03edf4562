"""Questions that people ask of the database: status, stories, nodes. Read only."""

import json
from collections.abc import Sequence
from functools import lru_cache

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.config import Config
from farflung.protocol.errors import NotFound
from farflung.protocol.identity import Signed, unseal
from farflung.protocol.messages import NodeView, Relays, RelayView, Status, StepView, Story, Verdict
from farflung.queries.evals import evals
from farflung.queries.node_views import PAID, NodeLine, lines, tally
from farflung.queries.redact import pathless, redaction_of
from farflung.store import transitions
from farflung.store.run import RunContext
from farflung.store.tables import (
    AUDIT_COUNTS,
    EVENTS,
    GROUP_COUNTS,
    LEASES,
    NODES,
    ROLLOUT_COUNTS,
    RUNS,
    STAYED,
    STEPS,
    SUBMISSIONS,
    VERDICTS,
)
from farflung.trust.audit_policy import probability_caught


def manifest(connection: Connection, run: str, digest: str) -> Signed:
    """A sealed manifest by its digest. Raises NotFound."""
    query = sa.select(STEPS.c.manifest).where(STEPS.c.run == run, STEPS.c.manifest_digest == digest)
    found = connection.execute(query).scalar()
    if found is None:
        raise NotFound(f"run {run!r} has no manifest {digest[:64]}")
    return msgspec.msgpack.decode(found, type=Signed)


def relays(connection: Connection, since: float) -> Relays:
    """Relays heard of since a time, those seen last first; no ejected key among them."""
    query = sa.select(NODES.c.node, NODES.c.url).where(
        *(NODES.c.role == "relay", NODES.c.url != "", NODES.c.status != "ejected"),
        *(NODES.c.seen_at >= since, NODES.c.phase != "gone"),
    )
    rows = connection.execute(query.order_by(NODES.c.seen_at.desc()).limit(64))
    return Relays(relays=[RelayView(node=row.node, url=row.url) for row in rows])


def logp_blob(connection: Connection, submission: str) -> str | None:
    """The blob with a node's own log-probabilities of a submission."""
    query = sa.select(SUBMISSIONS.c.logp_blob).where(SUBMISSIONS.c.submission == submission)
    return connection.execute(query).scalar()


def story(connection: Connection, config: Config, subject: str) -> Story:
    """All events of one id that may be told. Raises NotFound."""
    rows = transitions.story(connection, subject)
    if not rows:
        raise NotFound(f"nothing is known of {subject[:64]!r}")
    events = redaction_of(connection, config).events(connection, subject, rows)
    if not events:
        raise NotFound(f"the story of {subject[:64]!r} is told once its step can no longer be trained on")
    return Story(subject=subject, events=events)


def status(connection: Connection, run_ctx: RunContext, now: float) -> Status:
    """The run at a glance."""
    config, latest = run_ctx.config, run_ctx.latest(connection)
    counts = tally(connection, run_ctx.run)
    redaction = redaction_of(connection, config)
    found = lines(connection, config, counts, latest.step, now, redaction)
    paid = [counts.scored.get(n.node, (0, 0)) for n in found if n.is_worker and n.status != "ejected"]
    return Status(
        run=run_ctx.run,
        status=run_ctx.status(connection),
        model=pathless(config.model.path),
        env=pathless(config.env.name),
        steps_total=config.run.steps,
        latest=latest,
        started_at=connection.execute(sa.select(RUNS.c.created_at).where(RUNS.c.run == run_ctx.run)).scalar_one(),
        now=now,
        rollouts=redaction.counts(counts.statuses),
        groups=counts_of(connection, GROUP_COUNTS, run_ctx.run),
        leases_open=_leases_open(connection, run_ctx.run),
        leases_reissued=reissued(connection, run_ctx.run),
        audits={} if redaction.is_on else counts_of(connection, AUDIT_COUNTS, run_ctx.run),
        accepted=sum(count for count, _ in paid),
        accepted_tokens=sum(tokens for _, tokens in paid),
        steps=steps(connection, run_ctx.run),
        evals=evals(connection, config),
        nodes=[_view(line) for line in found],
        verdicts=verdicts(connection, run_ctx.run),
        breaker=connection.execute(sa.select(RUNS.c.breaker).where(RUNS.c.run == run_ctx.run)).scalar_one(),
        breaker_profiles=run_ctx.suspect_profiles(connection),
        catch={str(n): p for n, p in catch(connection, config).items()},
        warnings=warnings(connection),
    )


def counts_of(connection: Connection, kept: sa.Table, run: str, *only: sa.ColumnElement[bool]) -> dict[str, int]:
    """Rows by status, by what is kept of them."""
    query = sa.select(kept.c.status, sa.func.sum(kept.c.count)).where(kept.c.run == run, kept.c.count > 0, *only)
    return {row[0]: int(row[1]) for row in connection.execute(query.group_by(kept.c.status))}


def _leases_open(connection: Connection, run: str) -> int:
    query = sa.select(sa.func.count()).where(LEASES.c.run == run, LEASES.c.status == sa.literal_column("'open'"))
    return connection.execute(query).scalar_one()


def accepted(connection: Connection, run: str) -> tuple[int, int]:
    """Rollouts and tokens accepted for training, of nodes that are not ejected."""
    kept = ROLLOUT_COUNTS.c
    good = sa.and_(NODES.c.status != "ejected", NODES.c.role == "worker")
    query = (
        sa.select(sa.func.coalesce(sa.func.sum(kept.scored), 0), sa.func.coalesce(sa.func.sum(kept.tokens), 0))
        .join(NODES, NODES.c.node == kept.node)
        .where(kept.run == run, kept.status.in_(PAID), good)
    )
    row = connection.execute(query).one()
    return int(row[0]), int(row[1])


def reissued(connection: Connection, run: str) -> int:
    """Leases that ended without a submission and whose samples were leased again."""
    marked = sa.select(sa.func.count()).where(LEASES.c.run == run, sa.text("is_reissued"))
    return connection.execute(marked).scalar_one()


def steps(connection: Connection, run: str) -> list[StepView]:
    """Committed steps after the first weights."""
    rows = connection.execute(
        sa.select(STEPS.c.step, STEPS.c.seen_reward, STEPS.c.seen_groups, STEPS.c.committed_at, STEPS.c.metrics)
        .where(STEPS.c.run == run, STEPS.c.status == "committed", STEPS.c.step > 0)
        .order_by(STEPS.c.step)
    )
    return [
        StepView(
            step=r.step,
            reward=r.seen_reward,
            groups=r.seen_groups,
            committed_at=r.committed_at,
            metrics=msgspec.json.decode(r.metrics),
        )
        for r in rows
    ]


def _view(line: NodeLine) -> NodeView:
    return NodeView(
        node=line.node,
        name=line.name,
        role=line.role,
        status=line.status,
        record=f"{line.record.clean_rollouts} clean",
        phase=line.phase,
        loaded_step=line.loaded_step,
        accepted=line.accepted,
        rejected=line.rejected,
        audits=line.audits,
        statistic=line.record.statistic,
        tokens_per_s=line.tokens_per_s,
        credit=line.credit,
        escrow=line.escrow,
        lease=line.lease,
        seen_s_ago=line.seen_s_ago,
        is_online=line.is_online,
        hardware=line.hardware,
    )


def verdicts(connection: Connection, run: str, *, latest: int = 0) -> list[Verdict]:
    """Every verdict, oldest first; or the latest ones, newest first."""
    query = sa.select(VERDICTS.c.document).where(VERDICTS.c.run == run)
    query = query.order_by(VERDICTS.c.id.desc()).limit(latest) if latest else query.order_by(VERDICTS.c.id)
    documents: Sequence[bytes] = connection.execute(query).scalars().all()
    return [open_verdict(document) for document in documents]


def warnings(connection: Connection, most: int = 20) -> list[str]:
    """Warnings for people to look at, the latest last."""
    said = sa.and_(sa.text(STAYED), EVENTS.c.detail.like('%"warning"%'))
    rows = connection.execute(sa.select(EVENTS.c.detail).where(said).order_by(EVENTS.c.id.desc()).limit(most)).scalars()
    return [json.loads(detail)["warning"] for detail in reversed(list(rows))]


LOOK_AHEAD = (10, 60, 200)
CHEATED, POWER = 0.1, 0.9
"""The cheat that the odds are told for: it takes a tenth of its rollouts from other noise, and nine in ten of the
audits that hit one void it."""


def catch(connection: Connection, config: Config) -> dict[int, float]:
    """P(a trusted node that cheats on a tenth of its rollouts is found within n submissions), at the rate of the last
    submissions of trusted nodes; by audits alone, the tripwire left out.
    """
    recent = (
        sa.select(SUBMISSIONS.c.audit_probability)
        .where(SUBMISSIONS.c.run == config.run.name, SUBMISSIONS.c.audit_probability < 1)
        .order_by(SUBMISSIONS.c.received_at.desc())
        .limit(50)
    )
    rates = list(connection.execute(recent).scalars())
    rate = min(rates, default=config.trust.audit_floor)
    return {n: probability_caught(n, CHEATED, rate, config.lease.rollouts, POWER) for n in LOOK_AHEAD}


@lru_cache(maxsize=4096)
def open_verdict(document: bytes) -> Verdict:
    """A stored verdict, remembered: a look must not cost as many signatures as there are.

    Raises BadSignature if it was changed in the database.
    """
    return unseal(msgspec.msgpack.decode(document, type=Signed), "verdict", Verdict)
