"""Worker: stops for the machine's owner, gives memory back when that takes long, and goes on by itself."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import psutil

from farflung.config import WorkerSection
from farflung.config.idle import IdleSection, preferences_in
from farflung.engine.cpu.malloc import return_freed_memory
from farflung.idle.decide import Decision, Reason
from farflung.idle.lookout import Watch
from farflung.idle.sensors import Sensors
from farflung.idle.throttle import Throttle
from farflung.net.session import Session
from farflung.protocol.errors import FarflungError

log = logging.getLogger(__name__)
Remake = Callable[[], Awaitable[None]]
Is = Callable[[], bool]
WORDS = {"suspend": "suspended", "vacate": "vacated"}
LOOK_S, AGAIN_S = 0.1, 30.0
"""How soon the end of a wait is seen; until an engine is tried again that could not be made."""


class Loan:
    """One machine of an owner, as its worker uses it."""

    def __init__(self, given: IdleSection, folder: Path, settings: WorkerSection) -> None:
        """With what was given beside the preferences in the node's folder. Raises ConfigError."""
        self._sensors = Sensors(is_elsewhere=settings.is_elsewhere)
        self._watch = Watch(given, preferences_in(folder), self._sensors.read)
        self._throttle, self._is_server = Throttle(), settings.engine == "vllm"
        self._is_vacated = False
        self._telling: asyncio.Task[None] | None = None
        self._lock, self._leases = threading.Lock(), 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While this machine is looked at."""
        try:
            with self._watch.watching():
                yield
        finally:
            self._sensors.close()

    @property
    def is_recalled(self) -> bool:
        """Whether the owner needs the machine."""
        return self._watch.decision.action != "run"

    def bind(self, session: Session, end: Remake, start: Remake, leave: Callable[[], None], is_over: Is) -> None:
        """What is done with the node: `end` its engine where memory is to be given back, `start` makes it again, and
        it is told to `leave` at the end of time.
        """
        self._session, self._end, self._start, self._leave, self._is_over = session, end, start, leave, is_over

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """While a lease is generated. All the time of a server is work to rest for, that of two leases once."""
        with self._lock:
            if not self._leases:
                self._throttle.begin()
            self._leases += 1
        try:
            yield
        finally:
            with self._lock:
                self._leases -= 1
                if self._is_server and self._watch.rules.share < 1:
                    self._throttle.owe(self._watch.rules.share)
            if self.is_recalled:
                log.info("stopped generating because=%s", self._watch.decision.reason)

    def may_go_on(self) -> bool:
        """Between two tokens: rest as the owner's share has it; whether to make the next."""
        if self._watch.rules.share < 1 and not self._is_server:
            self._throttle.rest(self._watch.rules.share, lambda: self.is_recalled or self._is_over())
        return not self.is_recalled

    async def wait(self) -> None:
        """Until the machine may be used; its state is told in a heartbeat at once. One lane at a time waits."""
        await self._stand_by()
        while self._is_vacated and not self._is_over():
            await self._start_again()
            await self._stand_by()
        await self._rest()

    async def _stand_by(self) -> None:
        """Until the owner is gone. What the other lane is at comes to its end before memory is given back."""
        told, since_s = None, time.monotonic()
        while self.is_recalled and not self._is_over():
            decision = self._watch.decision
            if decision.reason == Reason.TIME_IS_UP:
                self._leave()
                return
            self._session.stats.phase = phase(decision)
            if told is None or (told.action, told.reason) != (decision.action, decision.reason):
                self._tell(decision)
                told = decision
            if decision.action == "vacate" and not self._session.held:
                await self._vacate()
            await asyncio.sleep(LOOK_S)
        if told is not None and not self._is_over():
            log.info("resuming after_s=%.1f", time.monotonic() - since_s)

    async def _start_again(self) -> None:
        """Make the engine; where others took its room meanwhile, later."""
        try:
            await self._start()
            self._is_vacated = False
        except (FarflungError, RuntimeError) as error:  # torch has no room on a device by a RuntimeError
            log.error("no engine because=%s trying_again_in_s=%.0f", error, AGAIN_S)
            await self._pause("waiting for its engine", AGAIN_S)

    async def _vacate(self) -> None:
        if not self._is_vacated:
            before_bytes = psutil.Process().memory_info().rss
            await self._end()
            await asyncio.to_thread(return_freed_memory)
            self._is_vacated = True
            after_bytes = psutil.Process().memory_info().rss
            log.info("memory given back rss_mb=%.0f before_mb=%.0f", after_bytes / 1e6, before_bytes / 1e6)

    def _tell(self, decision: Decision) -> None:
        """By a heartbeat that nothing waits for: the coordinator may be away."""
        wait_s = decision.resumes_in_s
        log.info("%s resumes_in_s=%s", phase(decision), "unknown" if wait_s is None else f"{wait_s:.0f}")
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(_heartbeat(self._session))

    async def _rest(self) -> None:
        """What is owed for a server's work, once it does none."""
        if not self._is_server or self._throttle.owed_s == 0:
            return
        while self._session.held and not self.is_recalled and not self._is_over():
            await asyncio.sleep(LOOK_S)
        owed_s, self._throttle.owed_s = self._throttle.owed_s, 0.0
        await self._pause("resting", owed_s)

    async def _pause(self, phase: str, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s and not self.is_recalled and not self._is_over():
            self._session.stats.phase = phase
            await asyncio.sleep(LOOK_S)


async def _heartbeat(session: Session) -> None:
    try:
        await session.heartbeat()
    except FarflungError as error:  # the regular one says it later
        log.warning("heartbeat failed because=%s", error)


def phase(decision: Decision) -> str:
    """A node's word for itself, such as `suspended (user_active)`."""
    return f"{WORDS[decision.action]} ({decision.reason})"
