"""Worker: its lanes, each at a lease of its own. One at a time asks for more, while the server still makes the other's.

The second lane is a server's: what an engine in the worker's own process makes of one call, it shares with no other.
"""

import asyncio
from collections.abc import Callable

from farflung.engine.base import Engine
from farflung.engine.vllm import VllmEngine
from farflung.protocol.messages import LANES, MOST_DEVICES

LOOK_S = 0.05
"""Seconds between two looks at what the other lane does."""
AWAY_S, MOST_AWAY_S = 2.0, 60.0
"""Waits for an engine that does not answer, at first and at most."""


class Lanes:
    """What the lanes of one worker know of each other."""

    def __init__(
        self,
        engine: Callable[[], Engine | None],
        slots: int,
        device: int,
        devices: int,
        is_stopping: Callable[[], bool],
    ) -> None:
        """`engine` gives the one that the worker has now, of one kind always."""
        self._engine, self._slots, self._is_stopping = engine, slots, is_stopping
        is_server = isinstance(engine(), VllmEngine)
        self.numbers = range(device, MOST_DEVICES, devices)[: LANES if is_server else 1]
        """The numbers under which leases are asked for: the device's own, and one beyond all devices."""
        self._starting: int | None = None
        self.generating = 0
        """Leases that are generated."""
        self.away_s, self._away_until = AWAY_S, 0.0

    async def turn(self, lane: int) -> bool:
        """Wait until this lane may ask for a lease; says whether it may, for the worker may be told to stop.

        That is once no other is at a lease that it does not generate yet, and no request waits for a slot: the last
        ones may end all at once, too late to ask for more.
        """
        while not (self._starting is None and self._has_room()) and not self._is_stopping():
            await asyncio.sleep(LOOK_S)
        if self._is_stopping():
            return False
        self._starting = lane
        return True

    def end_turn(self, lane: int) -> None:
        """Let the other lane ask."""
        self._starting = None if self._starting == lane else self._starting

    def _has_room(self) -> bool:
        engine = self._engine()
        return not isinstance(engine, VllmEngine) or engine.under_way <= self._slots

    async def wait_for_engine(self, clock: Callable[[], float]) -> None:
        """Longer each time, until it has worked again; a lane that finds the other waiting waits as long."""
        if self._away_until <= clock():
            self._away_until = clock() + self.away_s
            self.away_s = min(2 * self.away_s, MOST_AWAY_S)
        until = self._away_until
        while clock() < until and not self._is_stopping():
            await asyncio.sleep(0.1)
