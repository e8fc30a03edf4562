"""Redaction of audits while a run goes: steps that can still be trained on show nothing, and M is never shown.

Else a node could see which of its rollouts are held for audit, and how near to ejection it may go.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.config import Config
from farflung.protocol.messages import Event
from farflung.store.tables import AUDITS, LEASES, ROLLOUTS, RUNS, STEPS
from farflung.trust.record import NodeRecord


def pathless(value: Any) -> Any:
    """A setting as anybody may read it: of absolute paths the last part, for the rest tells of the operator's disk."""
    if isinstance(value, str):
        return value.rpartition("/")[2] if value.startswith(("/", "~", "file:")) else value
    if isinstance(value, list):
        return [pathless(one) for one in cast(list[Any], value)]
    if isinstance(value, dict):
        return {name: pathless(one) for name, one in cast(dict[str, Any], value).items()}
    return value


SHOWN_AS = "received"
"""The state in which a rollout held for audit is shown."""


@dataclass(frozen=True)
class Redaction:
    """Hides what concerns audits of steps from `since` on; nothing at all where that is None."""

    since: int | None = None

    @property
    def is_on(self) -> bool:
        """Whether anything is hidden."""
        return self.since is not None

    def status(self) -> Any:
        """The status of a rollout as a column, for queries that join its lease."""
        hidden = sa.and_(ROLLOUTS.c.status == "held", LEASES.c.step >= self.since) if self.is_on else sa.false()
        return sa.case((hidden, SHOWN_AS), else_=ROLLOUTS.c.status).label("status")

    def audits(self) -> Any:
        """Which audits may be shown."""
        return AUDITS.c.step < self.since if self.is_on else sa.true()

    def counts(self, statuses: dict[str, int]) -> dict[str, int]:
        """Rollouts by status."""
        shown = dict(statuses)
        if self.is_on and "held" in shown:
            shown[SHOWN_AS] = shown.get(SHOWN_AS, 0) + shown.pop("held")
        return shown

    def record(self, record: NodeRecord) -> NodeRecord:
        """The part of a node's record that may be shown: its status, not the evidence."""
        return NodeRecord(status=record.status, submissions=record.submissions) if self.is_on else record

    def events(self, connection: Connection, subject: str, events: Iterable[Any]) -> list[Event]:
        """The story of an id: of an audit of an open step nothing, of a rollout no word of being held."""
        shown_events = [
            Event(at=e.at, noun=e.noun, subject=e.subject, before=e.before, after=e.after, detail=e.detail)
            for e in events
        ]
        if not self.is_on or (step := _step_of(connection, subject)) is None or step < (self.since or 0):
            return shown_events
        return [shown for event in shown_events if (shown := _redacted(event)) is not None]


def redaction_of(connection: Connection, config: Config) -> Redaction:
    """The redaction of a run as it stands: none when the run is over, or where the operator wants none."""
    run = config.run.name
    status = connection.execute(sa.select(RUNS.c.status).where(RUNS.c.run == run)).scalar()
    if not config.coordinator.redact or status == "finished":
        return Redaction()
    committed = sa.select(sa.func.max(STEPS.c.step)).where(STEPS.c.run == run, STEPS.c.status == "committed")
    latest = connection.execute(committed).scalar()
    return Redaction(max(0, (-1 if latest is None else latest) - config.learn.max_staleness))


def _step_of(connection: Connection, subject: str) -> int | None:
    """The policy step of an audit or of a rollout."""
    audit = sa.select(AUDITS.c.step).where(AUDITS.c.audit == subject)
    rollout = sa.select(LEASES.c.step).join(ROLLOUTS, ROLLOUTS.c.lease == LEASES.c.lease)
    found = connection.execute(audit).scalar()
    return connection.execute(rollout.where(ROLLOUTS.c.rollout == subject)).scalar() if found is None else found


def _redacted(event: Event) -> Event | None:
    """An event as it may be told, if at all."""
    if event.noun == "audit" or event.before == "held" or (event.after == "held" and event.before != "leased"):
        return None
    if event.after == "held":
        return Event(
            at=event.at, noun=event.noun, subject=event.subject, before=event.before, after=SHOWN_AS, detail=""
        )
    return event
