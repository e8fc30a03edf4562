"""Connections to SQLite and PostgreSQL, and the faults of a database in words for people and for clients."""

import contextlib
import logging
import sqlite3
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, event, exc

from farflung.protocol.errors import ConfigError, Unavailable

log = logging.getLogger(__name__)
POSTGRES_OPTIONS = "-c idle_in_transaction_session_timeout=15000 -c lock_timeout=30000 -c statement_timeout=60000"
"""A coordinator that vanished in a transaction must not keep the lock, nor one that waits for it wait for ever."""
IN_MEMORY = ("cache_size=-16384", "temp_store=MEMORY")
"""16 MB of pages a connection; with the usual 2, a set of changes goes to the disk and back before its commit."""
BUSY_S = 10.0
"""How long SQLite's lock is waited for."""
SQLITE_AWAY = {
    getattr(sqlite3, f"SQLITE_{name}")
    for name in ("BUSY", "LOCKED", "IOERR", "FULL", "CANTOPEN", "READONLY", "PROTOCOL")
}
"""Codes of a file that is locked, full or gone, unlike those of a statement that is wrong."""
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT)
"""Codes of a file that is no database, or was one."""


def open_engine(url: str) -> Engine:
    """An engine for a URL, prepared as this package needs it; connects to nothing yet. Raises ConfigError."""
    options: dict[str, Any] = {}
    if not url.startswith("sqlite"):
        options = {"pool_pre_ping": True, "pool_size": 20, "connect_args": {"options": POSTGRES_OPTIONS}}
    try:
        engine = sa.create_engine(url, **options)
    except (exc.ArgumentError, ModuleNotFoundError) as error:
        raise ConfigError(f"database URL {shown(url)!r} cannot be used: {error}") from error
    if engine.dialect.name == "sqlite" and "immutable" not in engine.url.query:
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def shown(url: str) -> str:
    """A database URL without its password."""
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except exc.ArgumentError:
        return url.partition(":")[0]


def file_of(url: str) -> Path | None:
    """The file of a database, if it is one."""
    parts = sa.make_url(url)
    return Path(parts.database) if parts.get_backend_name() == "sqlite" and parts.database else None


def _prepare_sqlite(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # SQLAlchemy emits BEGIN itself, so that savepoints work
    connection.execute(f"PRAGMA busy_timeout={BUSY_S * 1000:.0f}")
    _to_wal(connection)
    for pragma in ("synchronous=FULL", "foreign_keys=ON", *IN_MEMORY):
        connection.execute(f"PRAGMA {pragma}")


def _to_wal(connection: sqlite3.Connection) -> None:
    """A new file becomes a WAL while no process writes to it; SQLite fails at once where others do, so wait here."""
    give_up = time.monotonic() + BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
        time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")


@contextlib.contextmanager
def reading(url: str) -> Generator[Connection]:
    """A connection to look at a database of a run that may be over. Raises ConfigError if there is none to be read."""
    if (file := file_of(url)) and not file.exists():
        raise ConfigError(f"there is no database {file}; was this run ever started?")
    engine = open_engine(readable(url))
    try:
        with named(url), engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def readable(url: str) -> str:
    """The URL of a database to look at: of a file beside which nothing can be written, one that needs nothing there.

    SQLite keeps an index of its journal in a file of its own, which a full disk or a read-only folder does not take.
    """
    file = file_of(url)
    if file is None or not file.exists():
        return url
    engine = open_engine(url)
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql("SELECT count(*) FROM sqlite_master")
    except exc.DBAPIError as error:
        journal = file.with_name(f"{file.name}-wal")
        if is_away(error) and not (journal.exists() and journal.stat().st_size):
            return f"sqlite:///file:{quote(str(file.resolve()))}?mode=ro&immutable=1&uri=true"
    finally:
        engine.dispose()
    return url


def is_away(error: BaseException) -> bool:
    """Whether the database is away, full or busy, so that the same request may well succeed later."""
    if not isinstance(error, exc.OperationalError | exc.InterfaceError | exc.InternalError):
        return False
    code = getattr(error.orig, "sqlite_errorcode", None)
    return code is None or code & 0xFF in SQLITE_AWAY


def client_error(error: Exception) -> Exception:
    """The error for a client whose request the database could not serve; the reason is for the log alone."""
    if not is_away(error):
        return error
    log.warning("database unavailable because=%s", str(error).splitlines()[0][:200])
    return Unavailable("the database cannot serve this now; try again", retry_after_s=1)


@contextlib.contextmanager
def named(url: str) -> Generator[None]:
    """A database that cannot be used as a ConfigError that names it and says what to do."""
    try:
        yield
    except exc.DBAPIError as error:
        raise ConfigError(f"database {shown(url)} {_ill(error)}") from error


def _ill(error: exc.DBAPIError) -> str:
    said = str(error.orig).splitlines()[0][:200]
    code = getattr(error.orig, "sqlite_errorcode", None)
    if code is None:
        return f"cannot be {'reached' if isinstance(error, exc.OperationalError) else 'used'}: {said}"
    if code & 0xFF in DAMAGED:
        return (
            f"is damaged ({said}); bring a backup back with `farflung restore`, or move the run's folder away and "
            "begin anew"
        )
    if code & 0xFF in SQLITE_AWAY:
        return f"cannot be opened ({said}); is its folder there, writable, and its disk not full?"
    return f"does not have this version's tables ({said}); go on with the run once, by --resume, to bring it up to date"
