"""Worker: stops for the machine's owner, gives memory back when that takes long, and goes on by itself."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import psutil

from farflung.config import WorkerSection
from farflung.config.idle import IdleSection, preferences_in
from farflung.engine.cpu.malloc import return_freed_memory
from farflung.idle.decide import Decision, Reason
from farflung.idle.sensors import Sensors
from farflung.idle.throttle import Throttle
from farflung.idle.watch import Watch
from farflung.net.session import Session
from farflung.protocol.errors import FarflungError

log = logging.getLogger(__name__)
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

    def begin(self) -> None:
        """Generation begins."""
        self._throttle.begin()

    def may_go_on(self, is_over: Callable[[], bool]) -> bool:
        """Between two tokens: rest as the owner's share has it; whether to make the next."""
        if self._watch.rules.share < 1 and not self._is_server:
            self._throttle.rest(self._watch.rules.share, lambda: self.is_recalled or is_over())
        return not self.is_recalled

    def end(self) -> None:
        """Generation ends; of a server all of it is work to rest for."""
        if self.is_recalled:
            log.info("stopped generating because=%s", self._watch.decision.reason)
        if self._watch.rules.share < 1 and self._is_server:
            self._throttle.owe(self._watch.rules.share)

    async def wait(
        self,
        session: Session,
        end: Callable[[], Awaitable[None]],
        start: Callable[[], Awaitable[None]],
        *,
        leave: Callable[[], None],
        is_over: Callable[[], bool],
    ) -> None:
        """Until the machine may be used; its state is told in a heartbeat at once.

        `end` ends the engine where memory is to be given back, `start` makes it again, `leave` is for the end of time.
        """
        await self._stand_by(session, end, leave, is_over)
        while self._is_vacated and not is_over():
            await self._start(session, start, is_over)
            await self._stand_by(session, end, leave, is_over)
        await self._rest(session, is_over)

    async def _stand_by(
        self,
        session: Session,
        end: Callable[[], Awaitable[None]],
        leave: Callable[[], None],
        is_over: Callable[[], bool],
    ) -> None:
        """Until the owner is gone."""
        told, since_s = None, time.monotonic()
        while self.is_recalled and not is_over():
            decision = self._watch.decision
            if decision.reason == Reason.TIME_IS_UP:
                leave()
                return
            if told is None or (told.action, told.reason) != (decision.action, decision.reason):
                self._tell(session, decision)
                told = decision
            if decision.action == "vacate":
                await self._vacate(end)
            await asyncio.sleep(LOOK_S)
        if told is not None and not is_over():
            log.info("resuming after_s=%.1f", time.monotonic() - since_s)

    async def _start(self, session: Session, start: Callable[[], Awaitable[None]], is_over: Callable[[], bool]) -> None:
        """Make the engine again; where others took its room meanwhile, later."""
        try:
            await start()
            self._is_vacated = False
        except (FarflungError, RuntimeError) as error:  # torch has no room on a device by a RuntimeError
            log.error("no engine because=%s trying_again_in_s=%.0f", error, AGAIN_S)
            session.stats.phase, until_s = "waiting for its engine", time.monotonic() + AGAIN_S
            while time.monotonic() < until_s and not self.is_recalled and not is_over():
                await asyncio.sleep(LOOK_S)

    async def _vacate(self, end: Callable[[], Awaitable[None]]) -> None:
        if not self._is_vacated:
            before_bytes = psutil.Process().memory_info().rss
            await end()
            await asyncio.to_thread(return_freed_memory)
            self._is_vacated = True
            after_bytes = psutil.Process().memory_info().rss
            log.info("memory given back rss_mb=%.0f before_mb=%.0f", after_bytes / 1e6, before_bytes / 1e6)

    def _tell(self, session: Session, decision: Decision) -> None:
        """By a heartbeat that nothing waits for: the coordinator may be away."""
        session.stats.phase = phase(decision)
        wait_s = decision.resumes_in_s
        log.info("%s resumes_in_s=%s", session.stats.phase, "unknown" if wait_s is None else f"{wait_s:.0f}")
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(_heartbeat(session))

    async def _rest(self, session: Session, is_over: Callable[[], bool]) -> None:
        """What is owed for a server's work."""
        until_s = time.monotonic() + (self._throttle.owed_s if self._is_server else 0.0)
        while time.monotonic() < until_s and not self.is_recalled and not is_over():
            session.stats.phase = "resting"
            await asyncio.sleep(LOOK_S)
        self._throttle.owed_s = 0.0 if self._is_server else self._throttle.owed_s


async def _heartbeat(session: Session) -> None:
    try:
        await session.heartbeat()
    except FarflungError as error:  # the regular one says it later
        log.warning("heartbeat failed because=%s", error)


def phase(decision: Decision) -> str:
    """A node's word for itself, such as `suspended (user_active)`."""
    return f"{WORDS[decision.action]} ({decision.reason})"
