"""Worker, validator and relay: one shard in pieces, from several relays at once, put together in order.

Every relay is asked for the next piece as soon as it has sent one, so fast ones send more, and a busy one holds the
others up only briefly. Ranges that come early wait in memory, a few of them; the file always holds a beginning.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

RANGE_BYTES = 4 << 20
AHEAD = 2
"""Ranges per relay that may be under way or in memory beyond the file's end."""
OVERDUE_S, OVERDUE_TIMES = 6.0, 2.0
"""A piece that takes longer than this, and than so many times the longest that came, is asked of another relay too."""
FADES = 0.95
"""The share of the longest that is left with each piece that comes."""
LOOK_S = 0.25
Take = Callable[[str, int, int], Awaitable[Sequence[bytes] | None]]
"""Bytes [start, end) from a relay, None if it fails."""


@dataclass(slots=True)
class Pace:
    """How long pieces take here, of whichever shard."""

    longest_s: float = 0.0

    def note(self, took_s: float) -> None:
        """A piece came."""
        self.longest_s = max(took_s, FADES * self.longest_s)

    @property
    def overdue_s(self) -> float:
        """How long one may take before another relay is asked."""
        return max(OVERDUE_S, OVERDUE_TIMES * self.longest_s)


class Ranges:
    """The rest of a shard of `size` bytes into a file that has its beginning."""

    def __init__(self, file: BinaryIO, size: int, take: Take, pace: Pace) -> None:
        self._file, self._size, self._take, self._pace = file, size, take, pace
        self._end = file.seek(0, 2)
        self._todo = deque(range(self._end, size, RANGE_BYTES))
        self._early: dict[int, Sequence[bytes]] = {}
        self._asked: dict[int, list[tuple[str, float]]] = {}
        """Offset → which relays were asked for it and when."""
        self._ahead = 0
        self._changed = asyncio.Event()
        self.came_from: dict[int, str] = {}
        """Offset → relay."""
        self.slow: set[str] = set()
        """Relays that were outrun by others on a piece."""

    async def fetch(self, urls: Sequence[str]) -> bool:
        """Fetch from these relays; whether the shard is whole, right or not."""
        self._ahead = AHEAD * len(urls) * RANGE_BYTES
        tasks = [asyncio.create_task(self._work(url)) for url in urls]
        try:
            while self._end < self._size and not all(task.done() for task in tasks):
                await self._news()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            if not task.cancelled() and (error := task.exception()):
                raise error
        return self._end >= self._size

    async def _work(self, url: str) -> None:
        """Ask one relay for piece after piece, until none is left or it fails."""
        while self._end < self._size:
            start = self._next(url)
            if start is None:
                await self._news()
                continue
            since = time.monotonic()
            self._asked.setdefault(start, []).append((url, since))
            data = await self._take(url, start, min(start + RANGE_BYTES, self._size))
            if data is None:
                self._give_back(start, url)
                return
            self._pace.note(time.monotonic() - since)
            self._keep(start, data, url)

    def _next(self, url: str) -> int | None:
        """A piece that no relay was asked for, or one that is overdue elsewhere."""
        if self._todo and self._todo[0] < self._end + self._ahead:
            return self._todo.popleft()
        limit = time.monotonic() - self._pace.overdue_s
        for start in sorted(self._asked):
            asked = self._asked[start]
            if len(asked) == 1 and asked[0][0] != url and asked[0][1] < limit:
                return start
        return None

    def _give_back(self, start: int, url: str) -> None:
        asked = [one for one in self._asked.pop(start, []) if one[0] != url]
        if asked:
            self._asked[start] = asked
        elif start not in self.came_from:
            self._todo.appendleft(start)
        self._changed.set()

    def _keep(self, start: int, data: Sequence[bytes], url: str) -> None:
        asked = self._asked.pop(start, [])
        if start not in self.came_from:
            self.slow |= {other for other, _ in asked if other != url and asked[0][0] == other}
            self.came_from[start], self._early[start] = url, data
        while self._end in self._early:
            parts = self._early.pop(self._end)
            self._file.writelines(parts)
            self._end += sum(map(len, parts))
        self._changed.set()

    async def _news(self) -> None:
        """Wait for a piece to come or to be given back, or long enough for one to be overdue."""
        self._changed.clear()
        try:
            async with asyncio.timeout(LOOK_S):
                await self._changed.wait()
        except TimeoutError:
            return


def wrong(bad: BinaryIO, good: BinaryIO, came_from: dict[int, str]) -> set[str]:
    """The relays whose pieces of a wrong shard differ from the right one."""
    found: set[str] = set()
    for start, url in came_from.items():
        if bad.seek(start) != good.seek(start) or bad.read(RANGE_BYTES) != good.read(RANGE_BYTES):
            found.add(url)
    return found
