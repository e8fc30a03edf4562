"""Requests that wait for one thread: a thread serves all that wait at once, sets of one kind together."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Connection

from farflung.protocol.errors import Unavailable

Serve = Callable[[Connection, Sequence[Any]], Sequence[Any]]
"""Serves requests of one kind: an answer for each, in their order; one that is an exception is raised to the caller."""
MOST_IN_A_COMMIT = 256
MOST_WAITING = 2000
"""Changes that may wait for the writer; more are refused with 503, for no caller waits so long."""


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """One request for the database, and the future that waits for its answer."""

    serve: Serve
    item: Any
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]


class BatchExecutor:
    """A thread that serves all that wait at once: `serve` asks for them when it is ready to."""

    def __init__(self, name: str, serve: Callable[[Callable[[], list[Waiting]]], None]) -> None:
        self._serve = serve
        self._queue: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()  # a caller never waits for the writer
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def submit(self, serve: Serve, item: Any) -> Any:
        """Wait in line for an answer. Raises Unavailable when the line is too long."""
        if self._queue.qsize() >= MOST_WAITING:
            raise Unavailable("too many requests wait for the database; try again", retry_after_s=1)
        loop = asyncio.get_running_loop()
        waiting = Waiting(serve, item, loop, loop.create_future())
        self._queue.put(waiting)
        return await waiting.future

    def close(self) -> None:
        """Serve the changes that wait, and end."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            self._serve(partial(self._drain, first))

    def _drain(self, first: Waiting) -> list[Waiting]:
        """The changes that wait now, `first` at the head."""
        batch = [first]
        while len(batch) < MOST_IN_A_COMMIT and not self._queue.empty():
            following = self._queue.get()
            if following is None:
                self._queue.put(None)
                break
            batch.append(following)
        return [waiting for waiting in batch if not waiting.future.cancelled()]


def singly(connection: Connection, changes: Sequence[Callable[[Connection], Any]]) -> list[Any]:
    """How changes are served that have nothing in common: `sets_of` makes sets of one of them."""
    return [change(connection) for change in changes]


def sets_of(batch: Sequence[Waiting]) -> list[list[Waiting]]:
    """Requests that are served together, in the order in which the first of each came."""
    sets: dict[Hashable, list[Waiting]] = {}
    for waiting in batch:
        sets.setdefault(waiting if waiting.serve is singly else waiting.serve, []).append(waiting)
    return list(sets.values())


def answer_all(served: Sequence[tuple[Waiting, Any]]) -> None:
    """Give every caller its answer, with one call for each event loop that waits for some."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
    for waiting, answer in served:
        loops.setdefault(waiting.loop, []).append((waiting.future, answer))
    for loop, answers in loops.items():
        with contextlib.suppress(RuntimeError):  # a loop that is closed: no caller waits any more
            loop.call_soon_threadsafe(_resolve, answers)


def _resolve(answers: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, answer in answers:
        if future.done():  # the caller has gone
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
