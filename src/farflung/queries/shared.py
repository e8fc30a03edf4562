"""One look at the database for all callers that ask the same: a thousand readers cost as much as one."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")
QUICK_S = 0.05
"""A look that takes no longer is taken anew each time, so that readers of a small run see it as it is."""
SHARE = 4.0
"""After a longer one there is none for this many times as long as it took: readers take a fifth of one thread."""


class Shared(Generic[T]):
    """The last look, while it is young. One at a time is under way, and callers that come meanwhile wait for it."""

    def __init__(self, read: Callable[[], Awaitable[T]], clock: Callable[[], float] = time.monotonic) -> None:
        self._read, self._clock = read, clock
        self._running: asyncio.Future[T] | None = None
        self._last: tuple[T] | None = None
        self._due = 0.0

    async def get(self) -> T:
        """The result of the last look, or of a fresh one."""
        if self._last is not None and self._clock() < self._due:
            return self._last[0]
        if self._running is None:
            self._running = asyncio.ensure_future(self._fresh())
        return await asyncio.shield(self._running)  # a caller that leaves must not take the look from the others

    def forget(self) -> None:
        """Look again at the next request."""
        self._due = 0.0

    async def _fresh(self) -> T:
        since = self._clock()
        try:
            found = await self._read()
        finally:
            self._running = None
        took_s = self._clock() - since
        self._last, self._due = (found,), self._clock() + (SHARE * took_s if took_s > QUICK_S else 0.0)
        return found
