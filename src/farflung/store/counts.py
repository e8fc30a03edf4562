"""Sums that the database keeps itself, in the transaction that changes a row: no reader adds up a whole history.

Each row of a source adds to one row of its sums, by triggers: of SQLite one for each row, of PostgreSQL one for each
statement. So they are right whichever process writes, after crashes too; `differences` holds them against the history.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Table, event

from farflung.store.tables import (
    AUDIT_COUNTS,
    AUDITS,
    BALANCES,
    ENTRIES,
    GROUP_COUNTS,
    GROUPS,
    ROLLOUT_COUNTS,
    ROLLOUTS,
    metadata,
)

SCORED = '%s"reward" IS NOT NULL'


@dataclass(frozen=True)
class Sums:
    """The sums kept of a table; `%s` stands for the row, with a dot."""

    source: Table
    target: Table
    """Its primary key are columns of the source."""
    adds: Mapping[str, str]
    """Column of the target → what a row of the source adds to it."""

    @property
    def keys(self) -> list[str]:
        """The columns that rows are summed by."""
        return [column.name for column in self.target.primary_key]


KEPT = (
    Sums(
        ROLLOUTS,
        ROLLOUT_COUNTS,
        {
            "count": "1",
            "scored": f"CASE WHEN {SCORED} THEN 1 ELSE 0 END",
            "tokens": f'CASE WHEN {SCORED} THEN %s"tokens" ELSE 0 END',
        },
    ),
    Sums(GROUPS, GROUP_COUNTS, {"count": "1"}),
    Sums(AUDITS, AUDIT_COUNTS, {"count": "1"}),
    Sums(ENTRIES, BALANCES, {"tokens": '%s"tokens"', "entries": "1"}),
)
WATCHED = {ROLLOUTS: ("status", "reward", "tokens"), GROUPS: ("status",), AUDITS: ("status",)}
"""Columns of a row that may change; entries of the ledger never do."""


def install(connection: Connection) -> None:
    """Make the triggers, where they are not there yet."""
    make = _for_sqlite if connection.dialect.name == "sqlite" else _for_postgresql
    for sums in KEPT:
        for statement in make(sums):
            connection.exec_driver_sql(statement)


def remove(connection: Connection) -> None:
    """Take away what outlives the tables: PostgreSQL's functions."""
    if connection.dialect.name == "postgresql":
        for sums in KEPT:
            connection.exec_driver_sql(f"DROP FUNCTION IF EXISTS {sums.target.name}_sums() CASCADE")


@event.listens_for(metadata, "after_create")
def _with_tables(_: object, connection: Connection, **__: object) -> None:
    install(connection)


def differences(connection: Connection) -> Iterator[str]:
    """Kept sums that are not what the rows of their source add up to, one sentence each."""
    for sums in KEPT:
        kept, counted = _sums(connection, sums), _counted(connection, sums)
        for key in sorted(kept.keys() | counted.keys()):
            nothing = (0,) * len(sums.adds)
            if kept.get(key, nothing) != counted.get(key, nothing):
                yield f"{sums.target.name} of {' '.join(map(str, key))}: {kept.get(key)}, it is {counted.get(key)}"


def _sums(connection: Connection, sums: Sums) -> dict[tuple[Any, ...], tuple[int, ...]]:
    rows = connection.execute(sa.select(*(sums.target.c[name] for name in (*sums.keys, *sums.adds))))
    return _by_key(rows, sums)


def _counted(connection: Connection, sums: Sums) -> dict[tuple[Any, ...], tuple[int, ...]]:
    rows = connection.exec_driver_sql(f"SELECT {_summed(sums, 1)} FROM {_quoted(sums.source.name)} AS r {_by(sums)}")
    return _by_key(rows, sums)


def _by_key(rows: Any, sums: Sums) -> dict[tuple[Any, ...], tuple[int, ...]]:
    size = len(sums.keys)
    return {tuple(row[:size]): tuple(int(value) for value in row[size:]) for row in rows}


# --- SQL -------------------------------------------------------------------------------------------------------------


def _for_sqlite(sums: Sums) -> Iterator[str]:
    """A trigger for each thing that may happen to a row."""
    gone, come = _row_sqlite(sums, "OLD", -1), _row_sqlite(sums, "NEW", 1)
    acts = {"INSERT": come}
    if columns := WATCHED.get(sums.source):
        acts |= {"DELETE": gone, f"UPDATE OF {_names(columns)}": gone + come}
    for act, body in acts.items():
        name = f"{sums.target.name}_{act.split()[0].lower()}"
        yield f"CREATE TRIGGER IF NOT EXISTS {name} AFTER {act} ON {_quoted(sums.source.name)} BEGIN {body} END"


def _row_sqlite(sums: Sums, row: str, sign: int) -> str:
    values = [f'{row}."{key}"' for key in sums.keys]
    values += [f"{sign} * ({_of(add, row)})" for add in sums.adds.values()]
    return f"{_into(sums)} VALUES ({', '.join(values)}) {_added(sums)};"


def _for_postgresql(sums: Sums) -> Iterator[str]:
    """One function, and a trigger for each kind of statement, which knows all rows that it changed."""
    function = f"{sums.target.name}_kept"
    branches = {"INSERT": ["new_rows"], "DELETE": ["old_rows"], "UPDATE": ["new_rows", "old_rows"]}
    body = " ".join(f"IF TG_OP = '{act}' THEN {_rows(sums, tables)} END IF;" for act, tables in branches.items())
    yield (
        f"CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql "
        f"AS $$ BEGIN {body} RETURN NULL; END $$"
    )
    for act in ("INSERT", "DELETE", "UPDATE") if sums.source in WATCHED else ("INSERT",):
        tables = " ".join(f"{table[:3].upper()} TABLE AS {table}" for table in branches[act])
        yield (
            f"CREATE OR REPLACE TRIGGER {sums.target.name}_{act.lower()} AFTER {act} ON {_quoted(sums.source.name)} "
            f"REFERENCING {tables} FOR EACH STATEMENT EXECUTE FUNCTION {function}()"
        )


def _rows(sums: Sums, tables: list[str]) -> str:
    """Add what changed; where rows that come and go cancel, nothing is written."""
    parts = [
        f"SELECT {_summed(sums, 1 if table == 'new_rows' else -1)} FROM {table} AS r {_by(sums)}" for table in tables
    ]
    names = _names(list(sums.adds))
    total = ", ".join(f'sum("{name}") AS "{name}"' for name in sums.adds)
    is_any = " OR ".join(f'sum("{name}") <> 0' for name in sums.adds)
    changed = f"SELECT {_names(sums.keys)}, {total} FROM ({' UNION ALL '.join(parts)}) AS parts {_by(sums)}"
    return f"INSERT INTO {sums.target.name} ({_names(sums.keys)}, {names}) {changed} HAVING {is_any} {_added(sums)};"


def _summed(sums: Sums, sign: int) -> str:
    adds = [f'sum({sign} * ({_of(add, "r")})) AS "{name}"' for name, add in sums.adds.items()]
    return ", ".join([_names(sums.keys), *adds])


def _by(sums: Sums) -> str:
    return f"GROUP BY {_names(sums.keys)}"


def _into(sums: Sums) -> str:
    return f"INSERT INTO {sums.target.name} ({_names([*sums.keys, *sums.adds])})"


def _added(sums: Sums) -> str:
    more = ", ".join(f'"{name}" = {sums.target.name}."{name}" + excluded."{name}"' for name in sums.adds)
    return f"ON CONFLICT ({_names(sums.keys)}) DO UPDATE SET {more}"


def _of(add: str, row: str) -> str:
    return add.replace("%s", f"{row}.")


def _names(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(map(_quoted, names))


def _quoted(name: str) -> str:
    return f'"{name}"'
