"""Worker: its lanes, each at a lease of its own. One at a time asks for more, while the server still makes the other's.

The second lane is a server's: what an engine in the worker's own process makes of one call, it shares with no other.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from farflung.engine.base import Engine
from farflung.engine.vllm import VllmEngine
from farflung.protocol.errors import Forbidden
from farflung.protocol.messages import LANES, MOST_DEVICES

log = logging.getLogger(__name__)
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
        self._engine = engine
        self._slots, self._is_stopping, self._first = slots, is_stopping, device
        self.numbers = range(device, MOST_DEVICES, devices)[: LANES if self._server else 1]
        """The numbers under which leases are asked for: the device's own, and one beyond all devices."""
        self._starting: int | None = None
        self.generating = 0
        """Leases that are generated."""
        self.away_s, self._away_until = AWAY_S, 0.0

    @property
    def _server(self) -> VllmEngine | None:
        """The engine of this moment, for it may be ended and made again."""
        engine = self._engine()
        return engine if isinstance(engine, VllmEngine) else None

    async def work(
        self, step: Callable[[int], Awaitable[None]], drain: Callable[[], None], is_done: Callable[[], bool]
    ) -> None:
        """Lease after lease in each lane. Raises what ends one; the other then hands in what it has."""
        lanes = (self._keep_working(lane, step, drain, is_done) for lane in self.numbers)
        for error in filter(None, await asyncio.gather(*lanes, return_exceptions=True)):
            raise error

    async def _keep_working(
        self, lane: int, step: Callable[[int], Awaitable[None]], drain: Callable[[], None], is_done: Callable[[], bool]
    ) -> None:
        try:
            while not is_done():
                await step(lane)
        except Forbidden as error:
            if lane == self._first:
                raise
            log.warning("one lease at a time because=%s", error)
        except BaseException:
            drain()
            raise

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
        server = self._server
        return server is None or server.under_way <= self._slots

    async def wait_for_engine(self, clock: Callable[[], float]) -> None:
        """Longer each time, until it has worked again; a lane that finds the other waiting waits as long."""
        if self._away_until <= clock():
            self._away_until = clock() + self.away_s
            self.away_s = min(2 * self.away_s, MOST_AWAY_S)
        until = self._away_until
        while clock() < until and not self._is_stopping():
            await asyncio.sleep(0.1)
