"""The live part: one snapshot for all viewers, and server-sent events that carry what changed."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from farflung.dashboard.formats import curves
from farflung.protocol.errors import Busy
from farflung.queries.snapshot import Snapshot

REFRESH_S = 1.0
SHARE = 10.0
"""The database is asked again no sooner than this many times as long as the last asking took."""
NODES_EVERY_S = 3.0
ALIVE_EVERY_S = 15.0
MOST_VIEWERS, OF_ADDRESS = 256, 16
"""Streams in all, and from one address: several windows of several people behind it."""

Frames = dict[str, str]
"""Name of an event → its data."""


class Viewers:
    """The viewers, by address. When all places are taken, the address with most streams loses its oldest."""

    def __init__(self, most: int = MOST_VIEWERS, of_address: int = OF_ADDRESS) -> None:
        self.most, self.of_address = most, of_address
        self._of: dict[str, list[asyncio.Event]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def check(self, sender: str) -> None:
        """Raises Busy for an address that has streams enough."""
        if len(self._of.get(sender, ())) >= self.of_address:
            raise Busy(f"{self.of_address} streams go to {sender} already; reload later", retry_after_s=30)

    def enter(self, sender: str) -> asyncio.Event:
        """A place for one stream; its event says that the stream has to end. Raises Busy."""
        self.check(sender)
        if len(self) >= self.most:
            most = max(self._of, key=lambda one: len(self._of[one]))
            oldest = self._of[most][0]
            oldest.set()
            self.leave(most, oldest)
        place = asyncio.Event()
        self._of.setdefault(sender, []).append(place)
        return place

    def leave(self, sender: str, place: asyncio.Event) -> None:
        """This stream is over; one that lost its place has none to give back."""
        left = [one for one in self._of.get(sender, ()) if one is not place]
        self._of[sender] = left
        if not left:
            del self._of[sender]


class Live:
    """Snapshots, shared and rationed, so that a thousand viewers cost the database as much as one."""

    def __init__(self, read: Callable[[], Awaitable[Snapshot]], render: Callable[[str, Snapshot], str]) -> None:
        self._read, self._render = read, render
        self._lock = asyncio.Lock()
        self._snapshot: Snapshot | None = None
        self._frames: tuple[Snapshot | None, Frames] = (None, {})
        self._due = 0.0
        self.viewers = Viewers()
        self._over = asyncio.Event()

    def stop(self) -> None:
        """End every stream, so that no viewer holds up a server that wants to stop."""
        self._over.set()

    async def snapshot(self, patience_s: float = 0.0) -> Snapshot:
        """The run as it stands, or stood a moment ago; up to `patience_s` longer ago where names are what counts."""
        async with self._lock:
            if self._snapshot is None or time.monotonic() >= self._due + patience_s:
                since = time.monotonic()
                self._snapshot = await self._read()
                took_s = time.monotonic() - since
                self._due = since + max(REFRESH_S, SHARE * took_s)
            return self._snapshot

    def forget(self) -> None:
        """Ask the database again at the next look."""
        self._snapshot = None

    async def frames(self) -> Frames:
        """The frames of the present snapshot, rendered once for all viewers."""
        snapshot = await self.snapshot()
        if self._frames[0] is not snapshot:
            self._frames = (snapshot, self._draw(snapshot))
        return self._frames[1]

    def _draw(self, snapshot: Snapshot) -> Frames:
        frames = {name: self._render(f"{name}.html", snapshot) for name in ("head", "strip", "pools", "verdicts")}
        return frames | {
            "curves": json.dumps(curves(snapshot.steps, snapshot.evals) | {"until": snapshot.steps_total}),
            "nodes": str(int(snapshot.now / NODES_EVERY_S)),
        }

    async def events(self, sender: str) -> AsyncIterator[bytes]:
        """Server-sent events for one viewer, each part only when it changed, until its place is needed."""
        place = self.viewers.enter(sender)
        try:
            sent: Frames = {"nodes": (await self.frames())["nodes"]}
            silent_since = time.monotonic()
            yield b"retry: 2000\n\n"
            while not self._over.is_set() and not place.is_set():
                frames = await self.frames()
                fresh = [name for name, data in frames.items() if sent.get(name) != data]
                if fresh:
                    yield b"".join(event(name, frames[name]) for name in fresh)
                    sent, silent_since = dict(frames), time.monotonic()
                elif time.monotonic() - silent_since > ALIVE_EVERY_S:
                    yield b": still here\n\n"
                    silent_since = time.monotonic()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._over.wait(), REFRESH_S)
        finally:
            self.viewers.leave(sender, place)


def event(name: str, data: str) -> bytes:
    """One server-sent event; every line of its data gets its own field."""
    lines = "".join(f"data: {line}\n" for line in data.splitlines() or [""])
    return f"event: {name}\n{lines}\n".encode()
