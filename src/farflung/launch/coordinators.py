"""`farflung coordinator` with several processes: each answers on the same port, on a core of its own.

They are replicas like any others, only on one machine: they share a database, not memory. One that dies is replaced.
"""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Coroutine
from typing import Any, NoReturn, TypeVar

from farflung.config import Config
from farflung.coordinator import open_coordinator, serve
from farflung.coordinator.process import refuse_guessable
from farflung.launch.forkserver import die_with_parent
from farflung.net.server import listen
from farflung.net.session import ending_signals
from farflung.protocol.errors import ConfigError, FarflungError
from farflung.protocol.shown import one_line
from farflung.store.metrics import Metrics
from farflung.tasks.create_run import local_grants

log = logging.getLogger(__name__)
T = TypeVar("T")
PAUSE_S = 0.2
_MOST_WORDS = 4096
"""Bytes that a pipe takes at once."""


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run an event loop: uvloop where there is one."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return asyncio.run(main)
    return uvloop.run(main)


def serve_all(config: Config) -> None:
    """A coordinator in as many processes as are configured, until told to stop. Raises ConfigError."""
    refuse_guessable(config)
    if config.coordinator.processes == 1:
        run(serve(config))
        return
    config = local_grants(config)
    with listen(config.coordinator.host, config.coordinator.port, is_shared=True) as listener:
        coordinator = config.coordinator.model_copy(update={"port": listener.getsockname()[1]})
        config = config.model_copy(update={"coordinator": coordinator})
        _create_first(config)
        metrics = Metrics(config.folder / "metrics.jsonl", time.monotonic)
        is_by_hand = metrics.begin(time.time())
        _keep(config)
        if is_by_hand:
            metrics.write("end", time.time())


def _create_first(config: Config) -> None:
    """Migrate and found once, before there are several; in a child, for the blob store's threads survive no fork."""
    heard, tell = os.pipe()
    child = _fork(_create(config, tell))
    os.close(tell)
    with open(heard, encoding="utf-8") as words:
        why = words.read()
    _, status = os.waitpid(child, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise ConfigError(why or f"the run could not be opened (exit code {code}); the lines above say why")


async def _create(config: Config, tell: int) -> None:
    try:
        (await open_coordinator(config)).ctx.database.close()
    except FarflungError as error:
        os.write(tell, one_line(str(error)).encode()[:_MOST_WORDS])
        raise SystemExit from error


def _keep(config: Config) -> None:
    """Have so many processes until a signal says stop."""
    stopping = False
    children: set[int] = set()

    def stop(number: int, _: object) -> None:
        nonlocal stopping
        stopping = True
        for child in children:
            os.kill(child, signal.SIGTERM)

    for number in ending_signals():
        signal.signal(number, stop)
    while children or not stopping:
        while len(children) < config.coordinator.processes and not stopping:
            children.add(_fork(serve(config)))
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended:
            children.discard(ended)
            if not stopping:
                log.error("a process ended with %d, starting another", os.waitstatus_to_exitcode(status))
        time.sleep(PAUSE_S if not ended else 0)


def _fork(main: Coroutine[Any, Any, None]) -> int:
    child = os.fork()
    if child == 0:
        _live(main)
    main.close()
    return child


def _live(main: Coroutine[Any, Any, None]) -> NoReturn:
    for number in ending_signals():
        signal.signal(number, signal.SIG_DFL)
    die_with_parent()
    code = 1
    try:
        run(main)
        code = 0
    except FarflungError as error:
        log.error("%s", error)
    except Exception:
        log.exception("coordinator process failed")
    finally:
        os._exit(code)
