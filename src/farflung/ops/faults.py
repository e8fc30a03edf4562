"""Faults for `farflung chaos`: what is done to which process, on a schedule that follows from a seed.

A *link* stands between a role and the coordinator and can hold back or slow what passes, as a network does: nothing is
lost, for TCP would send it again. A *full disk* is a limit on the size of files that a process may write, which fails
its writes as a full disk does, and needs no mount.
"""

import asyncio
import contextlib
import random
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

CHUNK_BYTES = 65_536
SLOW_BYTES_PER_S, SLOW_DELAY_S = 50_000, 0.1
SKEW_S = 300.0

TARGETS: dict[str, tuple[str, ...]] = {
    "kill": ("worker", "coordinator", "worker", "trainer", "worker", "validator", "scorer", "relay"),
    "outage": ("coordinator",),
    "freeze": ("worker", "coordinator", "trainer", "validator", "scorer", "relay"),
    "partition": ("worker", "trainer", "validator"),
    "slow": ("worker", "validator"),
    "full-disk": ("worker", "coordinator", "trainer"),
    "drain": ("worker",),
    "skew": ("worker",),
    "corrupt": ("relay",),
}
"""Which roles each kind of fault befalls, and how often in a round."""
LASTS_S = {"freeze": 3.0, "partition": 3.0, "slow": 4.0, "full-disk": 2.0}


@dataclass
class Fault:
    """One fault, and what was seen of it."""

    kind: str
    role: str
    due_s: float
    victim: str = ""
    at: float = 0.0
    lease: str = ""
    """What the victim held, if it is a worker."""
    skipped: str = ""
    detected_s: float | None = None
    recovered_s: float | None = None
    """From detection on."""
    lost_tokens: int = 0
    """What others made of its unfinished samples: the most that the victim had made in vain."""


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
    first = [("kill", role) for role in ("worker", "coordinator", "trainer", "validator")]
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
