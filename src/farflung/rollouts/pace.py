"""Worker: no faster than it was asked to be."""

import asyncio
import time
from collections.abc import Callable

CATCH_UP_S = 10.0
"""How far a paced worker may have fallen behind its pace, by faults not its own, and still make up for it."""


class Pace:
    """Most tokens in a second, over the last few seconds; 0 for no limit."""

    def __init__(self, tokens_per_s: float) -> None:
        self._tokens_per_s, self._paced_at = tokens_per_s, time.monotonic()

    async def keep(self, tokens: int, is_stopping: Callable[[], bool]) -> None:
        """Wait as long as so many tokens more should have taken."""
        if not self._tokens_per_s:
            return
        self._paced_at = max(self._paced_at, time.monotonic() - CATCH_UP_S) + tokens / self._tokens_per_s
        while (left_s := self._paced_at - time.monotonic()) > 0 and not is_stopping():
            await asyncio.sleep(min(left_s, 0.1))
