"""One way to change a status, and the story that each leaves: events in the transaction that changed it."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.protocol import states
from farflung.protocol.errors import IllegalTransition
from farflung.store.bulk import insert_rows, update_rows
from farflung.store.tables import EVENTS, GROUPS, ROLLOUTS, STEPS, TABLE_OF

T = TypeVar("T")
Event = dict[str, Any]
MOST_NAMED = 10_000
STORY_LINES = 12


def record(
    connection: Connection, noun: str, ids: Iterable[str], before: str, after: str, at: float, **detail: Any
) -> None:
    """Append one event per id."""
    text = msgspec.json.encode(detail, order="sorted").decode() if detail else ""
    rows = [{"at": at, "noun": noun, "subject": i, "before": before, "after": after, "detail": text} for i in ids]
    waiting: list[Event] | None = connection.info.get("events")
    if waiting is not None:
        waiting += rows
    elif rows:
        connection.execute(EVENTS.insert(), rows)


def flush_events(connection: Connection) -> None:
    """Write the events of a shared transaction at once: one statement for all of its requests."""
    rows: list[Event] = connection.info.get("events", [])
    insert_rows(connection, EVENTS, rows)
    rows.clear()


def memo(connection: Connection, name: Hashable, ask: Callable[[], T]) -> T:
    """The answer of `ask`, asked once in a shared transaction; `move` forgets it all when a run or step changes."""
    known: dict[Hashable, Any] | None = connection.info.get("memo")
    if known is None:
        return ask()
    if name not in known:
        known[name] = ask()
    return known[name]


def move(
    connection: Connection, noun: str, ids: Sequence[str], before: str, after: str, at: float, **detail: Any
) -> None:
    """Change the status of rows that are all at `before`, and write their events, or change nothing.

    Raises IllegalTransition with the story of the first row that is not where it was thought to be.
    """
    shift(connection, noun, ids, before, after)
    record(connection, noun, ids, before, after, at, **detail)


def shift(connection: Connection, noun: str, ids: Sequence[str], before: str, after: str) -> None:
    """`move` without the events, which the caller records: those of a set differ in their details."""
    if not ids:
        return
    states.check(noun, ids[0], before, after)
    for part in slices(ids):
        values = {"ids": part, "was": before, "becomes": after}
        if connection.execute(_move_statement(noun), values).rowcount != len(part):
            _complain(connection, noun, before, dict.fromkeys(part, after))
    if noun in ("run", "step") and "memo" in connection.info:
        connection.info["memo"].clear()
    if noun == "rollout" and after in states.REOPENING:
        _free(connection, ids)
    if noun == "group" and "open" in (before, after):
        _count_open(connection, ids, 1 if after == "open" else -1)


def shift_rows(connection: Connection, noun: str, rows: Sequence[Mapping[str, Any]], before: str) -> None:
    """`shift` that sets other columns too: rows with their key, `status` and the same columns each.

    Not for statuses that open a rollout's sample again, or a group.
    """
    for after in {row["status"] for row in rows}:
        states.check(noun, "", before, after)
    if update_rows(connection, TABLE_OF[noun], rows, status=before) != len(rows):
        key = next(iter(TABLE_OF[noun].primary_key)).name
        _complain(connection, noun, before, {row[key]: row["status"] for row in rows})


def slices(ids: Sequence[T]) -> Iterator[list[T]]:
    """Parts that a statement can name one by one; SQLite takes 32,766 parameters."""
    return (list(ids[start : start + MOST_NAMED]) for start in range(0, len(ids), MOST_NAMED))


@cache
def _move_statement(noun: str) -> sa.Update:
    table = TABLE_OF[noun]
    key = next(iter(table.primary_key))
    which = key.in_(sa.bindparam("ids", expanding=True)), table.c.status == sa.bindparam("was")
    return table.update().where(*which).values(status=sa.bindparam("becomes"))


def _free(connection: Connection, rollouts: Sequence[str]) -> None:
    """Their samples are free again."""
    query = sa.select(ROLLOUTS.c.group, sa.func.count()).where(ROLLOUTS.c.rollout.in_(rollouts))
    rows = [{"of": row[0], "more": row[1]} for row in connection.execute(query.group_by(ROLLOUTS.c.group))]
    more = GROUPS.c.free + sa.bindparam("more")
    connection.execute(GROUPS.update().where(GROUPS.c.group == sa.bindparam("of")).values(free=more), rows)


def _count_open(connection: Connection, groups: Sequence[str], sign: int) -> None:
    """Keep count of the open training groups of each step, so that no lease needs a count of them."""
    which = sa.and_(GROUPS.c.group.in_(groups), GROUPS.c.purpose == "train")
    query = sa.select(GROUPS.c.run, GROUPS.c.step, sa.func.count()).where(which).group_by(GROUPS.c.run, GROUPS.c.step)
    rows = [{"r": row[0], "s": row[1], "more": sign * row[2]} for row in connection.execute(query)]
    this = sa.and_(STEPS.c.run == sa.bindparam("r"), STEPS.c.step == sa.bindparam("s"))
    more = STEPS.c.open_groups + sa.bindparam("more")
    if rows:
        connection.execute(STEPS.update().where(this).values(open_groups=more), rows)


def _complain(connection: Connection, noun: str, before: str, becomes: Mapping[str, str]) -> None:
    """`becomes` has what each row should be now; those that were at `before` are."""
    table = TABLE_OF[noun]
    key = next(iter(table.primary_key))
    query = sa.select(key, table.c.status).where(key.in_(becomes))
    statuses = {row[0]: row[1] for row in connection.execute(query)}
    odd = next((i for i, after in becomes.items() if statuses.get(i) not in (before, after)), next(iter(becomes)))
    lines = [f"{row.before or 'new'}→{row.after}" for row in story(connection, odd)[-STORY_LINES:]]
    raise IllegalTransition(
        f"{noun} {odd} is {statuses.get(odd, 'missing')!r}, not {before!r}, and cannot become {becomes[odd]!r}; "
        f"its story: {' '.join(lines) or 'no events'}"
    )


_LEASED = sa.select(ROLLOUTS.c.rollout).where(
    ROLLOUTS.c.lease.in_(sa.bindparam("leases", expanding=True)), ROLLOUTS.c.status == "leased"
)


def end_leases(connection: Connection, leases: Sequence[str], after: str, at: float, **detail: Any) -> None:
    """Close open leases and free those of their rollouts that were not submitted."""
    move(connection, "lease", leases, "open", after, at, **detail)
    left = connection.execute(_LEASED, {"leases": list(leases)}).scalars()
    move(connection, "rollout", list(left), "leased", "expired", at, **detail)


def story(connection: Connection, subject: str) -> Sequence[Row[Any]]:
    """All events of one id, oldest first."""
    flush_events(connection)
    return connection.execute(sa.select(EVENTS).where(EVENTS.c.subject == subject).order_by(EVENTS.c.id)).all()


def last_event(connection: Connection) -> int:
    """Number of the latest event of all, 0 before the first: it tells whether anything has changed its status."""
    flush_events(connection)
    return connection.execute(_LAST_EVENT).scalar() or 0


_LAST_EVENT = sa.select(sa.func.max(EVENTS.c.id))
