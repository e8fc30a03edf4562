"""A node of several processes: one for each device of this machine, all under one key and over one folder of weights.

A process that dies is started again, and is given the lease again that it held; the others go on. One that refuses to
work stays away.
"""

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from farflung.config import WorkerSection
from farflung.launch.logs import start_logging
from farflung.launch.restarts import REFUSED
from farflung.net.session import ending_signals
from farflung.protocol.errors import ConfigError, FarflungError
from farflung.protocol.identity import Key

log = logging.getLogger(__name__)
AGAIN_S, MOST_AGAIN_S = 2.0, 60.0
"""Until a process that died is started again: at first, and at most, twice as long each time."""


@dataclass(frozen=True)
class OneProcess:
    """The work of one process, as it is sent to it."""

    number: int
    url: str
    folder: Path
    settings: WorkerSection
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    is_json: bool = False


def devices(settings: WorkerSection) -> list[str]:
    """The device of each process: as many as are asked for, else one on each accelerator. Raises ConfigError."""
    from farflung.numerics.devices import best, pick, present

    if settings.is_elsewhere or settings.device not in ("auto", best()):
        found = [settings.device]
    else:
        kind = best()
        found = [name for name in present() if name.startswith(kind)] or [settings.device]
    pick(found[0])
    count = settings.processes or len(found)
    return [found[number % len(found)] for number in range(count)]


def parts(
    url: str, folder: Path, settings: WorkerSection, options: dict[str, Any], *, is_json: bool
) -> list[OneProcess]:
    """The parts of a node, one of which is a worker alone."""
    names = devices(settings)
    common = {"processes": len(names)}
    return [
        OneProcess(
            number,
            url,
            folder,
            settings.model_copy(update=common | {"device": name, "metrics_port": _port(settings, number)}),
            options,
            is_json,
        )
        for number, name in enumerate(names)
    ]


def _port(settings: WorkerSection, number: int) -> int:
    return settings.metrics_port and settings.metrics_port + number


class Several:
    """The processes of one node."""

    def __init__(self, found: Sequence[OneProcess]) -> None:
        self._parts, self._is_stopping = found, False
        self._running: dict[int, SpawnProcess] = {}
        self._due: dict[int, float] = {}
        self._deaths = [0] * len(found)
        self._refused = 0

    def run(self) -> None:
        """Until all have ended. Raises ConfigError if all refused to work."""
        before = {number: signal.signal(number, self._stop) for number in ending_signals()}
        try:
            for part in self._parts:
                self._start(part.number)
            while self._running or (self._due and not self._is_stopping):
                self._wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._end()
        if self._refused == len(self._parts):
            raise ConfigError(f"all {len(self._parts)} processes of this node refused to work; see above")

    def pids(self) -> dict[int, int]:
        """The living processes by the number of their part."""
        return {number: process.pid or 0 for number, process in self._running.items()}

    def _start(self, number: int) -> None:
        self._due.pop(number, None)
        process = multiprocessing.get_context("spawn").Process(target=work, args=(self._parts[number],))
        process.start()
        self._running[number] = process
        log.info("started process=%d device=%s pid=%s", number, self._parts[number].settings.device, process.pid)

    def _wait(self) -> None:
        """Until a process ends or one is due again."""
        left_s = min((at - time.monotonic() for at in self._due.values()), default=MOST_AGAIN_S)
        connection.wait([process.sentinel for process in self._running.values()], max(0.0, min(left_s, 0.5)))
        for number, process in list(self._running.items()):
            if not process.is_alive():
                process.join()
                del self._running[number]
                self._note_end(number, process.exitcode or 0)
        for number in [number for number, at in self._due.items() if at <= time.monotonic() and not self._is_stopping]:
            self._start(number)

    def _note_end(self, number: int, code: int) -> None:
        if code == REFUSED:
            self._refused += 1
            log.error("process=%d refused to work; the others go on", number)
        elif code and not self._is_stopping:
            pause_s = min(AGAIN_S * 2 ** self._deaths[number], MOST_AGAIN_S)
            self._deaths[number] += 1
            self._due[number] = time.monotonic() + pause_s
            log.error("process=%d died with=%d starting_again_in_s=%.0f", number, code, pause_s)

    def _stop(self, *_: Any) -> None:
        """Tell all to drain."""
        self._is_stopping = True
        for process in self._running.values():
            process.terminate()

    def _end(self) -> None:
        for process in self._running.values():
            process.kill()
            process.join()


async def run_node(
    url: str, key: Key, folder: Path, settings: WorkerSection, options: dict[str, Any], *, is_json: bool = False
) -> None:
    """A worker in this process, or one in a process of its own for each device. Raises what a worker raises."""
    found = parts(url, folder, settings, options, is_json=is_json)
    if len(found) > 1:
        Several(found).run()  # there is nothing else to do here meanwhile
        return
    from farflung.worker import Worker

    await Worker(url, key, folder, settings, **options).run()


def work(part: OneProcess) -> None:
    """One process: a worker until it is done, told to stop, or its parent is gone."""
    from farflung.worker import Worker

    start_logging(part.is_json)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    key = Key.load_or_make(part.folder / "key")
    try:
        asyncio.run(Worker(part.url, key, part.folder, part.settings, part=part.number, **part.options).run())
    except FarflungError as error:
        log.error("refusing because=%s", error)
        os._exit(REFUSED)


def _end_with_parent() -> None:
    """Drain once the parent is gone, however it went."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
