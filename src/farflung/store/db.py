"""The coordinator's database: connections, group commit, and the order of its writers.

All writes go through one thread that puts every waiting request into one transaction and answers them after the commit.
So an acknowledged change is on disk, and a thousand small requests cost few commits. Requests of one kind may be served
as a set, with statements for all of them; each set has a savepoint, and one that fails is served again one by one.
Coordinators that share a database write one after the other: each transaction begins by taking the database's one
write lock, so no choice is ever made on rows that another is about to change.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, exc

from farflung.protocol.errors import ConfigError, Unavailable
from farflung.store.batch_executor import BatchExecutor, Waiting, answer_all, sets_of, singly
from farflung.store.sql_connections import client_error, is_away, named, open_engine, shown
from farflung.store.tables import metadata
from farflung.store.transitions import Event, flush_events

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

log = logging.getLogger(__name__)
T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")
Pool = Literal["work", "pages", "sweep"]
"""The readers: nodes and roles, people at the pages, or the clock. None of them waits for a thread of another."""
POOLS: dict[Pool, int] = {"work": 6, "pages": 2, "sweep": 1}
MOST_PAGE_READS = 64
"""Reads for pages that may run or wait."""
MIGRATIONS = Path(__file__).with_name("migrations")
EARLIER = ("0001",)
"""Schemas before the first one here."""
WRITE_LOCK = 0x6661_7266_6C75_6E67
"""Key of PostgreSQL's advisory lock for writers; "farflung" in ASCII."""


class Database:
    """One database, one writer thread, one for reads that are asked together, other readers in threads of their own."""

    def __init__(self, url: str) -> None:
        self.engine = open_engine(url)
        self.failures = 0
        """Commits that failed."""
        self._pools = {name: ThreadPoolExecutor(size, f"database-{name}") for name, size in POOLS.items()}
        self._page_reads = 0
        """Reads for pages that run or wait."""
        self._writer = BatchExecutor("database-writer", self._commit)
        self._reader = BatchExecutor("database-reader", self._serve_reads)

    async def write(self, change: Callable[[Connection], T]) -> T:
        """Run `change` in a transaction shared with other waiting writers; returns once it is committed."""
        return await self._writer.submit(singly, change)

    async def write_together(self, serve: Callable[[Connection, Sequence[A]], Sequence[B | Exception]], item: A) -> B:
        """The same for a request of a kind that is served in sets: `serve` gives an answer for each item of a set.

        An answer that is an exception is raised here, after the commit. If `serve` raises, the set is rolled back and
        its items are served one by one, so `serve` must do for a set of one whatever it does for many.
        """
        return await self._writer.submit(serve, item)

    async def read(self, query: Callable[[Connection], T], pool: Pool = "work") -> T:
        """Run `query` on a connection of its own, off the event loop, among others of the same pool."""

        def run() -> T:
            try:
                with self.engine.connect() as connection:
                    return query(connection)
            except exc.DBAPIError as error:
                raise client_error(error) from error

        return await self.aside(run, pool)

    async def read_page(self, query: Callable[[Connection], T]) -> T:
        """A read that anybody may ask for, however long it takes: few at a time, and no work of the run waits for it.

        Raises Unavailable when too many wait.
        """
        if self._page_reads >= MOST_PAGE_READS:
            raise Unavailable("too many look on; try again", retry_after_s=2)
        self._page_reads += 1
        try:
            return await self.read(query, "pages")
        finally:
            self._page_reads -= 1

    async def aside(self, work: Callable[[], T], pool: Pool) -> T:
        """Do something in a thread of a pool."""
        return await asyncio.get_running_loop().run_in_executor(self._pools[pool], work)

    async def read_together(self, serve: Callable[[Connection, Sequence[A]], Sequence[B | Exception]], item: A) -> B:
        """A read of a kind that is asked so often that the callers that wait share a query."""
        return await self._reader.submit(serve, item)

    def close(self) -> None:
        """Finish what is queued, then let go of the file."""
        self._writer.close()
        self._reader.close()
        for pool in self._pools.values():
            pool.shutdown()
        self.engine.dispose()

    def _commit(self, drain: Callable[[], list[Waiting]]) -> None:
        batch: list[Waiting] = []
        served: list[tuple[Waiting, Any]] = []
        try:
            with self.engine.connect() as connection, writing(connection):
                batch = drain()  # not before: changes that come while another coordinator writes are served at once
                for members in sets_of(batch):
                    served += _apply(connection, members)
                flush_events(connection)
        except Exception as error:  # the commit itself failed: no change is acknowledged
            self.failures += 1
            batch = batch or drain()
            log.warning("commit failed requests=%d", len(batch), exc_info=not is_away(error))
            answer = client_error(error)
            served = [(waiting, answer) for waiting in batch]
        answer_all(served)

    def _serve_reads(self, drain: Callable[[], list[Waiting]]) -> None:
        for members in sets_of(drain()):
            try:
                with self.engine.connect() as connection:
                    answers = members[0].serve(connection, [waiting.item for waiting in members])
            except Exception as error:
                log.warning("read failed requests=%d", len(members), exc_info=not is_away(error))
                answers = [client_error(error)] * len(members)
            answer_all(list(zip(members, answers, strict=True)))


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
        raise ConfigError(f"database {shown(url)} was made by {_maker(str(error))}") from error
    finally:
        engine.dispose()


def _maker(error: str) -> str:
    """The version that made a schema that this one does not know, and what to do."""
    if any(repr(one) in error for one in EARLIER):
        return f"an earlier version of farflung ({error}); end the run with that version, or begin it in another folder"
    return f"a later version of farflung ({error}); upgrade with: pip install -U farflung"


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
