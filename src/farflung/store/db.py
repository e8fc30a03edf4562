"""The coordinator's database: connections, group commit, and who may write when.

All writes go through one thread that puts every waiting request into one transaction and answers them after the commit.
So an acknowledged change is on disk, and a thousand small requests cost few commits. Requests of one kind may be served
as a set, with statements for all of them; each set has a savepoint, and one that fails is served again one by one.
Coordinators that share a database write one after the other: each transaction begins by taking the database's one
write lock, so no choice is ever made on rows that another is about to change.
"""

import asyncio
import contextlib
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, event, exc

from farflung.protocol.errors import ConfigError, Unavailable
from farflung.store.stories import Event, flush_events
from farflung.store.tables import metadata

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

log = logging.getLogger(__name__)
T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")
Serve = Callable[[Connection, Sequence[Any]], Sequence[Any]]
"""Serves requests of one kind: an answer for each, in their order; one that is an exception is raised to who asked."""
Pool = Literal["work", "pages", "sweep"]
"""Who reads: nodes and roles, those who look on, or the clock. None of them waits for a thread of another."""
POOLS: dict[Pool, int] = {"work": 6, "pages": 2, "sweep": 1}
MOST_GUESTS = 64
"""Reads for pages that may run or wait."""
MIGRATIONS = Path(__file__).with_name("migrations")
MOST_IN_A_COMMIT = 256
MOST_WAITING = 2000
"""Changes that may wait for the writer; more are refused with 503, for nobody waits so long."""
WRITE_LOCK = 0x6661_7266_6C75_6E67
"""Key of PostgreSQL's advisory lock for writers; "farflung" in ASCII."""
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


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """One request for the database, and who waits for its answer."""

    serve: Serve
    item: Any
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]


class Teller:
    """A thread that serves all that wait at once: `serve` asks for them when it is ready to."""

    def __init__(self, name: str, serve: Callable[[Callable[[], list[Waiting]]], None]) -> None:
        self._serve = serve
        self._queue: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()  # who puts never waits for who takes
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def ask(self, serve: Serve, item: Any) -> Any:
        """Wait in line for an answer. Raises Unavailable when the line is too long."""
        if self._queue.qsize() >= MOST_WAITING:
            raise Unavailable("too many requests wait for the database; try again", retry_after_s=1)
        loop = asyncio.get_running_loop()
        waiting = Waiting(serve, item, loop, loop.create_future())
        self._queue.put(waiting)
        return await waiting.future

    def close(self) -> None:
        """Serve those who wait, and end."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            self._serve(partial(self._line, first))

    def _line(self, first: Waiting) -> list[Waiting]:
        """Who waits now, `first` at the head."""
        batch = [first]
        while len(batch) < MOST_IN_A_COMMIT and not self._queue.empty():
            following = self._queue.get()
            if following is None:
                self._queue.put(None)
                break
            batch.append(following)
        return [waiting for waiting in batch if not waiting.future.cancelled()]


class Database:
    """One database, one writer thread, one for reads that are asked together, other readers in threads of their own."""

    def __init__(self, url: str) -> None:
        self.engine = open_engine(url)
        self.failures = 0
        """Commits that failed."""
        self._pools = {name: ThreadPoolExecutor(size, f"database-{name}") for name, size in POOLS.items()}
        self._guests = 0
        """Reads for pages that run or wait."""
        self._writer = Teller("database-writer", self._commit)
        self._reader = Teller("database-reader", self._look)

    async def write(self, change: Callable[[Connection], T]) -> T:
        """Run `change` in a transaction shared with other waiting writers; returns once it is committed."""
        return await self._writer.ask(_singly, change)

    async def write_together(self, serve: Callable[[Connection, Sequence[A]], Sequence[B | Exception]], item: A) -> B:
        """The same for a request of a kind that is served in sets: `serve` gives an answer for each item of a set.

        An answer that is an exception is raised here, after the commit. If `serve` raises, the set is rolled back and
        its items are served one by one, so `serve` must do for a set of one whatever it does for many.
        """
        return await self._writer.ask(serve, item)

    async def read(self, query: Callable[[Connection], T], pool: Pool = "work") -> T:
        """Run `query` on a connection of its own, off the event loop, among others of the same pool."""

        def run() -> T:
            try:
                with self.engine.connect() as connection:
                    return query(connection)
            except exc.DBAPIError as error:
                raise told(error) from error

        return await self.aside(run, pool)

    async def read_page(self, query: Callable[[Connection], T]) -> T:
        """A read that anybody may ask for, however long it takes: few at a time, and no work of the run waits for it.

        Raises Unavailable when too many wait.
        """
        if self._guests >= MOST_GUESTS:
            raise Unavailable("too many look on; try again", retry_after_s=2)
        self._guests += 1
        try:
            return await self.read(query, "pages")
        finally:
            self._guests -= 1

    async def aside(self, work: Callable[[], T], pool: Pool) -> T:
        """Do something in a thread of a pool."""
        return await asyncio.get_running_loop().run_in_executor(self._pools[pool], work)

    async def read_together(self, serve: Callable[[Connection, Sequence[A]], Sequence[B | Exception]], item: A) -> B:
        """A read of a kind that is asked so often that those who wait share a query."""
        return await self._reader.ask(serve, item)

    def close(self) -> None:
        """Finish what is queued, then let go of the file."""
        self._writer.close()
        self._reader.close()
        for pool in self._pools.values():
            pool.shutdown()
        self.engine.dispose()

    def _commit(self, line: Callable[[], list[Waiting]]) -> None:
        batch: list[Waiting] = []
        served: list[tuple[Waiting, Any]] = []
        try:
            with self.engine.connect() as connection, writing(connection):
                batch = line()  # not before: whoever comes while another coordinator writes is served at once
                for members in _sets(batch):
                    served += _apply(connection, members)
                flush_events(connection)
        except Exception as error:  # the commit itself failed: nobody's change is acknowledged
            self.failures += 1
            batch = batch or line()
            log.warning("commit failed requests=%d", len(batch), exc_info=not is_away(error))
            answer = told(error)
            served = [(waiting, answer) for waiting in batch]
        _answer(served)

    def _look(self, line: Callable[[], list[Waiting]]) -> None:
        for members in _sets(line()):
            try:
                with self.engine.connect() as connection:
                    answers = members[0].serve(connection, [waiting.item for waiting in members])
            except Exception as error:
                log.warning("read failed requests=%d", len(members), exc_info=not is_away(error))
                answers = [told(error)] * len(members)
            _answer(list(zip(members, answers, strict=True)))


def _singly(connection: Connection, changes: Sequence[Callable[[Connection], Any]]) -> list[Any]:
    """How changes are served that have nothing in common: `_sets` makes sets of one of them."""
    return [change(connection) for change in changes]


def _sets(batch: Sequence[Waiting]) -> list[list[Waiting]]:
    """Requests that are served together, in the order in which the first of each came."""
    sets: dict[Hashable, list[Waiting]] = {}
    for waiting in batch:
        sets.setdefault(waiting if waiting.serve is _singly else waiting.serve, []).append(waiting)
    return list(sets.values())


def _apply(connection: Connection, members: Sequence[Waiting]) -> list[tuple[Waiting, Any]]:
    """Serve a set in a savepoint; if that fails, nothing of it is left, and each member is served alone."""
    events, acts = connection.info["events"], connection.info["acts"]
    marks = len(events), len(acts)
    connection.exec_driver_sql("SAVEPOINT change")
    try:
        answers = members[0].serve(connection, [waiting.item for waiting in members])
        served = list(zip(members, answers, strict=True))
    except Exception as error:
        if is_away(error):
            raise  # the whole transaction is gone, not only this set
        connection.exec_driver_sql("ROLLBACK TO SAVEPOINT change")
        del events[marks[0] :], acts[marks[1] :]
        connection.info["memo"].clear()
        served = [(members[0], error)] if len(members) == 1 else []
    connection.exec_driver_sql("RELEASE SAVEPOINT change")
    return served or [pair for waiting in members for pair in _apply(connection, [waiting])]


def _answer(served: Sequence[tuple[Waiting, Any]]) -> None:
    """Give everybody an answer, with one call for each event loop that waits for some."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
    for waiting, answer in served:
        loops.setdefault(waiting.loop, []).append((waiting.future, answer))
    for loop, answers in loops.items():
        with contextlib.suppress(RuntimeError):  # a loop that is closed: nobody waits any more
            loop.call_soon_threadsafe(_resolve, answers)


def _resolve(answers: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, answer in answers:
        if future.done():  # who asked has gone
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)


@contextlib.contextmanager
def writing(connection: Connection) -> Generator[None]:
    """A transaction that holds the database's one write lock: BEGIN IMMEDIATE, or an advisory lock of PostgreSQL."""
    connection.execution_options(writes=True)
    with _turn(connection), connection.begin():
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(WRITE_LOCK)))
        acts = list[Callable[[], None]]()
        info = connection.info  # a connection that is lost meanwhile has none
        info.update(events=list[Event](), memo=dict[Any, Any](), acts=acts)
        try:
            yield
        finally:
            for name in ("events", "memo", "acts"):
                info.pop(name, None)
    for act in acts:
        act()


@contextlib.contextmanager
def _turn(connection: Connection) -> Generator[None]:
    """Wait in line with the other processes of this machine: SQLite itself looks for its lock only now and then."""
    path = connection.engine.url.database
    if fcntl is None or connection.dialect.name != "sqlite" or not path or path == ":memory:":
        yield
        return
    with open(f"{path}-turn", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def after_commit(connection: Connection, act: Callable[[], None]) -> None:
    """Do something in memory once what it rests on is in the database; nothing outside of a shared transaction."""
    if "acts" in connection.info:
        connection.info["acts"].append(act)


def is_away(error: BaseException) -> bool:
    """Whether the database is away, full or busy, so that the same request may well succeed later."""
    if not isinstance(error, exc.OperationalError | exc.InterfaceError | exc.InternalError):
        return False
    code = getattr(error.orig, "sqlite_errorcode", None)
    return code is None or code & 0xFF in SQLITE_AWAY


def told(error: Exception) -> Exception:
    """The error for a client whose request the database could not serve; the reason is for the log alone."""
    if not is_away(error):
        return error
    log.warning("database unavailable because=%s", str(error).splitlines()[0][:200])
    return Unavailable("the database cannot serve this now; try again", retry_after_s=1)


def open_engine(url: str) -> Engine:
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


def _prepare_sqlite(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # SQLAlchemy emits BEGIN itself, so that savepoints work
    connection.execute(f"PRAGMA busy_timeout={BUSY_S * 1000:.0f}")
    _to_wal(connection)
    for pragma in ("synchronous=FULL", "foreign_keys=ON", *IN_MEMORY):
        connection.execute(f"PRAGMA {pragma}")


def _to_wal(connection: sqlite3.Connection) -> None:
    """A new file becomes a WAL while nobody writes to it; SQLite fails at once where others do, so wait here."""
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


def migrate(url: str) -> None:
    """Bring the schema of the database at `url` to this version's; replicas that start together do it in turn."""
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["engine"] = engine = open_engine(url)
    try:
        with named(url), engine.connect() as connection, _alone(connection):
            command.upgrade(config, "head")
    except CommandError as error:
        raise ConfigError(
            f"database {shown(url)} was made by a later version of farflung ({error}); upgrade with: pip install -U "
            "farflung"
        ) from error
    finally:
        engine.dispose()


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


def file_of(url: str) -> Path | None:
    """The file of a database, if it is one."""
    parts = sa.make_url(url)
    return Path(parts.database) if parts.get_backend_name() == "sqlite" and parts.database else None


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


@contextlib.contextmanager
def _alone(connection: Connection) -> Generator[None]:
    """Hold a lock of PostgreSQL's for as long as this connection lives, or this machine's turn at SQLite's file."""
    with _turn(connection):
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_lock(WRITE_LOCK + 1)))
            connection.commit()
        yield
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_unlock(WRITE_LOCK + 1)))
            connection.commit()


def create_all(engine: Engine) -> None:
    """Make the tables without migrations, for tests that hold one against the other."""
    metadata.create_all(engine)
