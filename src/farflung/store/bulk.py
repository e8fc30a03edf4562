"""Writes many rows in one statement, so that other threads do not come between any two.

A driver that takes rows one by one waits for its turn again after each: with a busy event loop beside it, that is most
of the time that a set of changes takes.

Numbers of rows are made up of few sizes, so that the statements are few as well and the database has them prepared.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from sqlalchemy import Connection, Table
from sqlalchemy.sql.schema import ScalarElementColumnDefault

SIZES = (128, 32, 8, 2, 1)
"""Rows in a statement; the largest, with the widest table's columns, has far fewer parameters than SQLite takes."""


def insert_rows(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows that all name the same columns; columns that they leave out have their default."""
    if not rows:
        return
    names, defaults = _columns(table, tuple(rows[0]))
    mark = _mark(connection)
    for part in _parts(rows):
        values = [value for row in part for value in (*(row[name] for name in names), *defaults.values())]
        connection.exec_driver_sql(_insertion(table, (*names, *defaults), len(part), mark), tuple(values))


def update_rows(
    connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]], *, status: str | None = None
) -> int:
    """Set columns of rows that are named by their primary key: the same columns in each, and no row twice.

    With `status`, only of rows that have it now. Gives how many there were.
    """
    mark, count = _mark(connection), 0
    for part in _parts(rows):
        values = [value for row in part for value in row.values()]
        if status is not None:
            values.append(status)
        statement = _change(table, tuple(rows[0]), len(part), mark, has_status=status is not None)
        count += connection.exec_driver_sql(statement, tuple(values)).rowcount
    return count


def _parts(rows: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[Mapping[str, Any]]]:
    start = 0
    while start < len(rows):
        size = next(size for size in SIZES if size <= len(rows) - start)
        yield rows[start : start + size]
        start += size


def _mark(connection: Connection) -> str:
    return "?" if connection.dialect.name == "sqlite" else "%s"


@cache
def _columns(table: Table, given: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The columns that are given, and the defaults of others."""
    defaults = {column.name: column.default for column in table.columns if column.name not in given}
    return given, {name: one.arg for name, one in defaults.items() if isinstance(one, ScalarElementColumnDefault)}


@cache
def _insertion(table: Table, names: tuple[str, ...], size: int, mark: str) -> str:
    columns = ", ".join(f'"{name}"' for name in names)
    return f'INSERT INTO "{table.name}" ({columns}) VALUES {_values(len(names), size, mark)}'


@cache
def _change(table: Table, names: tuple[str, ...], size: int, mark: str, *, has_status: bool) -> str:
    """No common table expression: Python's driver counts the rows of what begins with UPDATE alone."""
    key = next(iter(table.primary_key)).name
    given = {name: f"given.column{number}" for number, name in enumerate(names, start=1)}
    changes = ", ".join(f'"{name}" = {value}' for name, value in given.items() if name != key)
    return (
        f'UPDATE "{table.name}" SET {changes} FROM (VALUES {_values(len(names), size, mark)}) AS given '
        f'WHERE "{table.name}"."{key}" = {given[key]}'
        + (f' AND "{table.name}"."status" = {mark}' if has_status else "")
    )


def _values(columns: int, size: int, mark: str) -> str:
    row = f"({', '.join([mark] * columns)})"
    return ", ".join([row] * size)
