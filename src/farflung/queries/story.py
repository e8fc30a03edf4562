"""The story of any id: its kind, its relations and everything that happened to it. Read only."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.config import Config
from farflung.learner.difficulty import Count, pass_rate
from farflung.protocol.errors import NotFound
from farflung.protocol.messages import Event
from farflung.queries import browse, views
from farflung.queries.node_views import describe
from farflung.queries.redact import Redaction, pathless, redaction_of
from farflung.store import ledger
from farflung.store.tables import (
    AUDITS,
    EVENTS,
    GROUPS,
    LEASES,
    NODES,
    ROLLOUTS,
    RUNS,
    STEPS,
    SUBMISSIONS,
    TASKS,
    VERDICTS,
)
from farflung.tasks.draw import drawn_from
from farflung.trust.record import NodeRecord, Watched

EVENTS_SHOWN = 500
RELATED_SHOWN = 100
Fact = tuple[str, Any]
"""A label and a value; values that are ids become links."""


@dataclass(frozen=True)
class Related:
    """A small table of what belongs to an id."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Story:
    """The content of the story page."""

    noun: str
    subject: str
    facts: list[Fact]
    related: list[Related] = field(default_factory=list[Related])
    rollouts: list[Row[Any]] = field(default_factory=list[Row[Any]])
    events: list[Event] = field(default_factory=list[Event])


def tell(connection: Connection, config: Config, subject: str) -> Story:
    """The story of one id, as far as it may be told. Raises NotFound."""
    redaction = redaction_of(connection, config)
    query = sa.select(EVENTS).where(EVENTS.c.subject == subject).order_by(EVENTS.c.id.desc()).limit(EVENTS_SHOWN)
    events = redaction.events(connection, subject, list(connection.execute(query))[::-1])
    for noun, find in FINDERS.items():
        found = find(connection, config.run.name, subject, redaction)
        if found is not None:
            facts, related, rollouts = found
            return Story(noun, subject, facts, related, rollouts, events)
    if not events:
        raise NotFound(f"nothing is known of {subject[:64]!r}")
    return Story(events[0].noun, subject, [], events=events)


Found = tuple[list[Fact], list[Related], list[Row[Any]]]


def _row(connection: Connection, table: sa.Table, subject: str) -> Row[Any] | None:
    return connection.execute(sa.select(table).where(next(iter(table.primary_key)) == subject)).first()


def _rollout(connection: Connection, run: str, subject: str, redaction: Redaction) -> Found | None:
    row = browse.rollout(connection, subject, redaction)
    if row is None:
        return None
    facts = [("status", row.status), ("node", row.node), ("lease", row.lease), ("submission", row.submission)]
    facts += [("group", row.group), ("task", row.task), ("sample", row.sample), ("policy step", row.step)]
    facts += [("purpose", row.purpose), ("tokens", row.tokens), ("re-issued", "yes" if row.is_reissue else "no")]
    if row.batch_step is not None:
        facts.append(("trained in step", f"{run}-step-{row.batch_step}"))
    audits = _audits(connection, AUDITS.c.submission == row.submission, redaction) if row.submission else []
    drawn = [line for line in audits if subject in json.loads(line.rollouts)]
    return facts, [_audit_table("Audits that drew it", drawn)], [row]


def _lease(connection: Connection, run: str, subject: str, redaction: Redaction) -> Found | None:
    row = _row(connection, LEASES, subject)
    if row is None:
        return None
    facts = [("status", row.status), ("node", row.node), ("purpose", row.purpose), ("policy step", row.step)]
    facts += [("submission", row.submission), ("opened", Moment(row.opened_at)), ("expires", Moment(row.expires_at))]
    return facts, [], browse.siblings(connection, ROLLOUTS.c.lease == subject, redaction)


def _group(connection: Connection, run: str, subject: str, redaction: Redaction) -> Found | None:
    row = _row(connection, GROUPS, subject)
    if row is None:
        return None
    facts = [("status", row.status), ("task", row.task), ("policy step", row.step), ("purpose", row.purpose)]
    facts += [("samples", row.samples), ("mean reward", row.reward), ("opened", Moment(row.opened_at))]
    facts.append(("has variance", {None: None, True: "yes", False: "no"}[row.is_informative]))
    if row.batch_step is not None:
        facts.append(("in the batch of", f"{run}-step-{row.batch_step}"))
    return facts, [], browse.siblings(connection, ROLLOUTS.c.group == subject, redaction)


def _audit(connection: Connection, run: str, subject: str, redaction: Redaction) -> Found | None:
    row = _row(connection, AUDITS, subject)
    if row is None or (redaction.since is not None and row.step >= redaction.since):
        return None
    facts = [("status", row.status), ("outcome", row.outcome), ("node", row.node), ("submission", row.submission)]
    facts += [("lease", row.lease), ("policy step", row.step), ("replayed by", row.claimed_by)]
    facts += [("tokens replayed", row.tokens), ("opened", Moment(row.opened_at))]
    return facts, [], browse.siblings(connection, ROLLOUTS.c.rollout.in_(json.loads(row.rollouts)), redaction)


def _submission(connection: Connection, run: str, subject: str, redaction: Redaction) -> Found | None:
    row = _row(connection, SUBMISSIONS, subject)
    if row is None:
        return None
    facts = [("node", row.node), ("lease", row.lease), ("received", Moment(row.received_at))]
    facts += [
        ("rollouts", row.rollouts),
        ("tokens", row.tokens),
        ("generated in (its own word)", f"{row.generate_s:.2f} s"),
    ]
    audits = _audit_table("Audits", _audits(connection, AUDITS.c.submission == subject, redaction))
    return facts, [audits], browse.siblings(connection, ROLLOUTS.c.submission == subject, redaction)


def _task(connection: Connection, run: str, subject: str, redaction: Redaction) -> Found | None:
    row = _row(connection, TASKS, subject)
    if row is None:
        return None
    query = sa.select(GROUPS).where(GROUPS.c.task == subject).order_by(GROUPS.c.opened_at.desc()).limit(RELATED_SHOWN)
    rows = [(g.group, g.purpose, g.step, g.status, g.reward) for g in connection.execute(query)]
    facts: list[Fact] = [("split", row.split), ("position", row.position), ("prompt", row.prompt)]
    if row.target:
        facts.append(("length asked for", f"{row.target} tokens"))
    if row.tried:
        count = Count(row.tried, row.right, row.tokens)
        facts.append(("pass rate, running", f"{pass_rate(count):.2f}, from {row.tried:.0f} samples"))
        facts.append(("tokens a sample takes", f"{row.tokens / row.tried:.0f}"))
    if not redaction.is_on:  # it holds the answer
        facts.append(("as the scorer gets it", row.payload.decode(errors="replace")))
    return facts, [Related("Groups", ("group", "purpose", "policy step", "status", "mean reward"), rows)], []


def _step(connection: Connection, run: str, subject: str, redaction: Redaction) -> Found | None:
    by_digest = sa.or_(STEPS.c.manifest_digest == subject, STEPS.c.weights_digest == subject)
    row = connection.execute(sa.select(STEPS).where(sa.or_(STEPS.c.id == subject, by_digest))).first()
    if row is None:
        return None
    facts: list[Fact] = [("step", row.step), ("status", row.status), ("claimed", Moment(row.claimed_at))]
    if row.manifest is not None:
        manifest = browse.open_unchecked(row.manifest)
        facts += [("committed", Moment(row.committed_at)), ("manifest", row.manifest_digest)]
        facts += [
            ("weights digest", row.weights_digest),
            ("parent", manifest.parent),
            ("checkpoint", pathless(row.checkpoint)),
        ]
        kinds = [manifest.kind] * bool(manifest.shards) + [f"difference to step {manifest.base_step}"] * bool(
            manifest.deltas
        )
        facts += [("kind", " and ".join(kinds)), ("tensors", len(manifest.tensors))]
        facts += [("bytes whole", f"{manifest.full_bytes:,}"), ("bytes of the difference", f"{manifest.delta_bytes:,}")]
    metrics = sorted(json.loads(row.metrics or "{}").items())
    people = [
        (c.node, c.name, c.rollouts, c.submissions, c.tokens) for c in browse.contributors(connection, run, row.step)
    ]
    columns = ("node", "name", "rollouts", "submissions", "tokens")
    query = sa.select(ROLLOUTS.c.submission).distinct().join(GROUPS, GROUPS.c.group == ROLLOUTS.c.group)
    query = query.where(GROUPS.c.run == run, GROUPS.c.batch_step == row.step, ROLLOUTS.c.status == "trained")
    submissions = [tuple(found) for found in connection.execute(query.limit(RELATED_SHOWN))]
    related = [Related("Trained by", columns, people), Related("Submissions", ("submission",), submissions)]
    return facts, [*related, *_drawn(row, redaction), Related("Metrics", ("name", "value"), metrics)], []


def _drawn(row: Row[Any], redaction: Redaction) -> list[Related]:
    """The tasks drawn for a policy, once no step can train on them."""
    if row.drawn is None or (redaction.since is not None and row.step >= redaction.since):
        return []
    columns = ("task at position", "pool", "estimated pass rate", "drawn from the estimate")
    rows = [(one.position, one.pool, one.rate, one.draw if one.draw >= 0 else "any") for one in drawn_from(row.drawn)]
    return [Related("Drawn for its policy", columns, rows[:RELATED_SHOWN])]


def _node(connection: Connection, run: str, subject: str, redaction: Redaction) -> Found | None:
    row = _row(connection, NODES, subject)
    if row is None:
        return None
    record = redaction.record(msgspec.msgpack.decode(row.record, type=NodeRecord))
    facts = [("name", row.name), ("role", row.role), ("status", row.status if row.role == "worker" else "granted")]
    facts += [("hardware", describe(row.hardware)), ("engine", row.engine), ("profile", row.profile)]
    facts += [("phase", row.phase), ("loaded step", row.loaded_step if row.loaded_step >= 0 else None)]
    facts += [("tokens/s", f"{row.tokens_per_s:,.0f}"), ("joined", Moment(row.registered_at))]
    facts += [("last seen", Moment(row.seen_at)), ("serves shards at", row.url)]
    facts += [("credit", ledger.balance(connection, ledger.credit(subject)))]
    facts += [("escrow", ledger.balance(connection, ledger.escrow(subject)))]
    facts += [("submissions", record.submissions)]
    if not redaction.is_on:
        facts += [("audited rollouts", record.audited_rollouts), ("clean in a row", record.clean_rollouts)]
        facts += [("bad submissions", record.bad_submissions), ("M", f"{record.statistic:.4g}")]
        facts += [("most like", record.suspicion), ("flips in all replays", _watched(record.watched))]
    query = sa.select(LEASES).where(LEASES.c.node == subject).order_by(LEASES.c.opened_at.desc()).limit(20)
    leases = [
        (le.lease, le.purpose, le.step, le.status, Moment(le.opened_at), le.submission)
        for le in connection.execute(query)
    ]
    related = [Related("Latest leases", ("lease", "purpose", "policy step", "status", "opened", "submission"), leases)]
    related.append(_audit_table("Latest audits", _audits(connection, AUDITS.c.node == subject, redaction)))
    return facts, [_verdicts(connection, subject), *related], []


def _watched(watched: Watched) -> str:
    """The sum of all replays of a node, and by how much its flips raised its reward."""
    if not watched.rollouts:
        return ""
    each = watched.gain / watched.rollouts
    return (
        f"{watched.flips} in {watched.rollouts} rollouts, {watched.allowed:.3g} allowed; {watched.liked} to a token "
        f"that the policy likes better; reward {each:+.3g} a rollout; "
        f"M = {watched.statistic:.3g}"
    )


def _run(connection: Connection, run: str, subject: str, redaction: Redaction) -> Found | None:
    row = _row(connection, RUNS, subject)
    if row is None:
        return None
    tree = json.loads(row.config)
    settings = [(f"{part}.{name}", value) for part in SHOWN for name, value in tree.get(part, {}).items()]
    facts: list[Fact] = [("status", row.status), ("founded", Moment(row.created_at))]
    return facts, [Related("Settings", ("name", "value"), [(n, json.dumps(pathless(v))) for n, v in settings])], []


SHOWN = ("run", "model", "env", "generate", "learn", "lease", "trust", "eval")
"""Sections of the configuration that anybody may read; invites and database URLs are in the others."""

FINDERS: dict[str, Callable[[Connection, str, str, Redaction], Found | None]] = {
    "rollout": _rollout,
    "lease": _lease,
    "group": _group,
    "audit": _audit,
    "node": _node,
    "step": _step,
    "task": _task,
    "submission": _submission,
    "run": _run,
}


class Moment(float):
    """Unix seconds that are shown as a time."""


def _audits(connection: Connection, which: Any, redaction: Redaction) -> list[Any]:
    columns = (AUDITS.c.audit, AUDITS.c.status, AUDITS.c.outcome, AUDITS.c.step, AUDITS.c.rollouts, AUDITS.c.claimed_by)
    query = sa.select(*columns, AUDITS.c.opened_at, AUDITS.c.submission).where(which, redaction.audits())
    return list(connection.execute(query.order_by(AUDITS.c.opened_at.desc()).limit(20)))


def _audit_table(title: str, audits: list[Any]) -> Related:
    rows = [
        (a.audit, a.status, a.outcome, a.step, len(json.loads(a.rollouts)), a.claimed_by, Moment(a.opened_at))
        for a in audits
    ]
    return Related(title, ("audit", "status", "outcome", "policy step", "rollouts", "validator", "opened"), rows)


def _verdicts(connection: Connection, node: str) -> Related:
    query = sa.select(VERDICTS.c.document).where(VERDICTS.c.node == node).order_by(VERDICTS.c.id.desc()).limit(20)
    found = [views.open_verdict(document) for document in connection.execute(query).scalars()]
    rows = [(v.outcome, v.audit, f"{v.statistic:.4g}", f"{v.threshold:.4g}", v.reason) for v in found]
    return Related("Verdicts", ("outcome", "audit", "statistic", "threshold", "reason"), rows)
