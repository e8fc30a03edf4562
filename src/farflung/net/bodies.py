"""Large bodies on their way in: how many bytes all of them may take together, and one at a time from each sender.

A body is counted as it arrives, not as it is declared, so that a promise of 32 MB which never comes costs others
nothing, and until its request is answered, for what is made of it takes memory as well. Each process counts for itself.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from farflung.protocol.errors import Busy, Unavailable

Grow = Callable[[int], None]
"""So many bytes more have arrived. Raises Unavailable."""
IN_LINE, PATIENCE_S = 4, 10.0
"""Bodies of one sender that may wait for the one before, and how long: one that was sent again after a lost answer."""


@dataclass(eq=False)
class _Sender:
    """The bodies of one sender."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    count: int = 0
    held: int = 0
    """Bytes of the one whose turn it is."""


class Bodies:
    """Bytes of large bodies that are being received or worked on; senders that `is_exempt` names are not counted."""

    def __init__(self, most_bytes: float, is_exempt: Callable[[str], bool] = lambda sender: False) -> None:
        self.most_bytes, self._is_exempt = most_bytes, is_exempt
        self._lines: dict[str, _Sender] = {}
        self._total = 0

    @asynccontextmanager
    async def receiving(self, sender: str) -> AsyncGenerator[Grow]:
        """While one body of a sender is received and served; the next waits its turn. Raises Busy for one too many."""
        if self._is_exempt(sender):
            yield lambda size: None
            return
        line = self._lines.setdefault(sender, _Sender())
        if line.count > IN_LINE:
            raise Busy(f"node {sender} sends {line.count} bodies already; one at a time", retry_after_s=1)
        line.count += 1
        try:
            async with self._turn(line, sender):
                yield lambda size: self._grow(line, size)
        finally:
            line.count -= 1
            if not line.count:
                del self._lines[sender]

    def _grow(self, line: _Sender, size: int) -> None:
        if self._total + size > self.most_bytes and self._total > line.held:
            raise Unavailable(f"{self._total >> 20} MiB of bodies are on their way; try again", retry_after_s=2)
        line.held += size
        self._total += size

    @asynccontextmanager
    async def _turn(self, line: _Sender, sender: str) -> AsyncGenerator[None]:
        try:
            await asyncio.wait_for(line.turn.acquire(), PATIENCE_S)
        except TimeoutError:
            raise Busy(f"node {sender} sends a body already; one at a time", retry_after_s=1) from None
        try:
            yield
        finally:
            self._total -= line.held
            line.held = 0
            line.turn.release()
