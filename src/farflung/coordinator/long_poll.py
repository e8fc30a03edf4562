"""Long polls: requests of workers, scorers, validators and the trainer that wait for work."""

import asyncio
import random
import time
from collections import OrderedDict, defaultdict
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
IDLE_S = 1.0
"""Callers that wait for work look again after so long without an event: claims lapse and audits linger by the clock."""


class WaitQueue:
    """Callers that wait for something to change. Few look again at a time, the longest waiting first.

    If all did, a thousand idle nodes would ask the database a thousand times for each change.
    """

    at_once = 16
    most = 4096
    base_s, longest_s = 0.5, 30.0

    def __init__(self) -> None:
        self._waiting: OrderedDict[object, asyncio.Future[bool]] = OrderedDict()
        self._is_closed = False

    def wake(self, count: int = at_once) -> None:
        """Something changed: let the next `count` look. One that finds something wakes another."""
        for _ in range(min(count, len(self._waiting))):
            _, future = self._waiting.popitem(last=False)
            if not future.done():
                future.set_result(True)

    async def wait(self, wait_s: float) -> bool:
        """Whether it is worth looking again; not so when the time is up or too many wait already."""
        if wait_s <= 0 or self._is_closed or len(self._waiting) >= self.most:
            return False
        token, future = object(), asyncio.get_running_loop().create_future()
        self._waiting[token] = future
        try:
            async with asyncio.timeout(wait_s):
                return await future
        except TimeoutError:
            return False
        finally:
            self._waiting.pop(token, None)

    def close(self) -> None:
        """Let no caller wait any more."""
        self._is_closed = True
        for future in self._waiting.values():
            if not future.done():
                future.set_result(False)

    def pause_s(self) -> float:
        """How long one that got nothing should stay away: longer the more wait, and no two as long."""
        share = len(self._waiting) / self.most
        return random.uniform(0.5, 1.5) * min(self.longest_s, self.base_s + self.longest_s * share)


class LongPoll:
    """One queue for each kind of work that is waited for."""

    def __init__(self) -> None:
        self._queues: defaultdict[str, WaitQueue] = defaultdict(WaitQueue)
        self._woken_event, self._woken_at = 0, 0.0

    async def poll(
        self, kind: str, ask: Callable[[], Awaitable[T]], is_something: Callable[[T], bool], wait_s: float
    ) -> T:
        """Ask until there is something or the time is up, again when something changed and it is this one's turn."""
        until, queue = time.monotonic() + wait_s, self._queues[kind]
        while True:
            answer = await ask()
            if is_something(answer):
                queue.wake(1)
                return answer
            if not await queue.wait(until - time.monotonic()):
                return answer

    def pause_s(self, kind: str) -> float:
        """How long one that got nothing of this kind should stay away."""
        return self._queues[kind].pause_s()

    def wake(self) -> None:
        """Something changed."""
        for queue in self._queues.values():
            queue.wake()

    def wake_if_due(self, event: int, now: float) -> None:
        """All that callers wait for is an event, this coordinator's or another's, or comes by time alone."""
        if event != self._woken_event or now - self._woken_at >= IDLE_S:
            self._woken_event, self._woken_at = event, now
            self.wake()

    def close(self) -> None:
        """Keep no caller waiting."""
        for queue in self._queues.values():
            queue.close()
