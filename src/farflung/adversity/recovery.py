"""Recovery from a fault of `farflung chaos`: when it showed, and when its victim's work was in other hands.

All from events with the coordinator's times, but for the end of a process, which the swarm saw.
"""

from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.adversity.faults import LASTS_S, Fault
from farflung.store.tables import EVENTS, NODES, ROLLOUTS

Row = dict[str, Any]


def settle(connection: Connection, fault: Fault, restarts: list[Row]) -> None:
    """Fill in `detected_s`, `recovered_s` and `lost_tokens`; those of coordinator and database were seen as it ran."""
    if fault.skipped or fault.role in ("coordinator", "database"):
        return
    if fault.role == "worker":
        _settle_lease(connection, fault)
        return
    fault.detected_s = _shown_s(fault, restarts)
    done = {"trainer": _next_step, "validator": _audits_taken, "scorer": _scored, "relay": _nothing}
    at = done[fault.role](connection, fault)
    fault.recovered_s = None if at is None else max(0.0, at - fault.at - fault.detected_s)
    if at == fault.at:
        fault.detected_s = 0.0


def _shown_s(fault: Fault, restarts: list[Row]) -> float:
    """From the fault until the swarm saw the end of its victim, or, if it lived, until the fault was over."""
    seen = [line["at"] for line in restarts if line["name"] == fault.victim and line["at"] >= fault.at]
    return min([*seen, fault.at + LASTS_S.get(fault.kind, 60.0)]) - fault.at


# Each gives when work went on, `fault.at` if nothing was held up, None if it never did.


def _nothing(connection: Connection, fault: Fault) -> float:
    """A relay is no node's only source; the throughput has its cost."""
    return fault.at


def _next_step(connection: Connection, fault: Fault) -> float | None:
    committed = sa.and_(EVENTS.c.noun == "step", EVENTS.c.after == "committed", EVENTS.c.at > fault.at)
    return connection.execute(sa.select(sa.func.min(EVENTS.c.at)).where(committed)).scalar()


def _audits_taken(connection: Connection, fault: Fault) -> float | None:
    """When the last audit that the victim had claimed was claimed again or answered, by whomsoever."""
    name = connection.execute(sa.select(NODES.c.node).where(NODES.c.name == fault.victim)).scalar()
    last = {row.subject: row for row in _events(connection, "audit", EVENTS.c.at <= fault.at)}
    held = [audit for audit, row in last.items() if row.after == "claimed" and f'"{name}"' in row.detail]
    return _last_of_firsts(connection, "audit", held, ("claimed", "done", "cancelled"), fault.at)


def _scored(connection: Connection, fault: Fault) -> float | None:
    """When the last of those that waited for a score at that time had it, or was no longer wanted."""
    last = {row.subject: row.after for row in _events(connection, "rollout", EVENTS.c.at <= fault.at)}
    waiting = [rollout for rollout, status in last.items() if status == "received"]
    return _last_of_firsts(connection, "rollout", waiting, ("accepted", "held", "void", "dropped"), fault.at)


def _events(connection: Connection, noun: str, *which: Any) -> list[Any]:
    query = sa.select(EVENTS.c.subject, EVENTS.c.after, EVENTS.c.at, EVENTS.c.detail)
    return list(connection.execute(query.where(EVENTS.c.noun == noun, *which).order_by(EVENTS.c.id)))


def _last_of_firsts(
    connection: Connection, noun: str, subjects: list[str], after: tuple[str, ...], since: float
) -> float | None:
    """When the last of some subjects had first come to one of some statuses; None if one never did."""
    first: dict[str, float] = {}
    for row in _events(connection, noun, EVENTS.c.at > since, EVENTS.c.after.in_(after)):
        first.setdefault(row.subject, row.at)
    if not all(subject in first for subject in subjects):
        return None
    return max((first[subject] for subject in subjects), default=since)


def _settle_lease(connection: Connection, fault: Fault) -> None:
    """A worker's fault shows when its lease ends unsubmitted, and is over when each of its samples is leased again."""
    ends = sa.select(EVENTS.c.at, EVENTS.c.after).where(EVENTS.c.subject == fault.lease, EVENTS.c.after != "open")
    end = connection.execute(ends).first()
    if end is None or end.after == "submitted":
        fault.detected_s = fault.recovered_s = 0.0  # it held nothing, or handed it in all the same
        return
    fault.detected_s = max(0.0, end.at - fault.at)
    lost = connection.execute(sa.select(ROLLOUTS).where(ROLLOUTS.c.lease == fault.lease)).all()
    again = [_leased_again(connection, row, end.at) for row in lost if row.status == "expired"]
    fault.recovered_s = max((at - end.at for at in again if at is not None), default=0.0)
    fault.lost_tokens = sum(_made_again(connection, row) for row in lost if row.status == "expired")


def _made_again(connection: Connection, row: Any) -> int:
    """Tokens that another node made of a sample: the same seed gives the same text, so no more of it was lost."""
    same = sa.and_(ROLLOUTS.c.group == row.group, ROLLOUTS.c.sample == row.sample, ROLLOUTS.c.rollout != row.rollout)
    return connection.execute(sa.select(sa.func.max(ROLLOUTS.c.tokens)).where(same)).scalar() or 0


def _leased_again(connection: Connection, row: Any, since: float) -> float | None:
    """When another node got the sample, or its group was dropped; None if neither came before the end."""
    same = sa.and_(ROLLOUTS.c.group == row.group, ROLLOUTS.c.sample == row.sample, ROLLOUTS.c.rollout != row.rollout)
    query = sa.select(sa.func.min(EVENTS.c.at)).join(ROLLOUTS, ROLLOUTS.c.rollout == EVENTS.c.subject)
    leased = connection.execute(query.where(same, EVENTS.c.after == "leased", EVENTS.c.at >= since)).scalar()
    if leased is not None:
        return leased
    dropped = sa.and_(EVENTS.c.subject == row.group, EVENTS.c.after == "dropped")
    return connection.execute(sa.select(sa.func.min(EVENTS.c.at)).where(dropped)).scalar()
