"""Processes as a swarm deals with them: signals, waiting within bounds, how long a log is."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any


def tell(pid: int, what: signal.Signals) -> None:
    """Send a signal to a process that may have ended meanwhile."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, what)


async def comes_first(wanted: Coroutine[Any, Any, Any], unwanted: Coroutine[Any, Any, Any], within_s: float) -> bool:
    """Whether something came about before something else did or the time was up."""
    came, ended = asyncio.create_task(wanted), asyncio.create_task(unwanted)
    await asyncio.wait({came, ended}, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
    has_come = came.done()
    came.cancel()
    ended.cancel()
    return has_come


async def wait_or_kill(process: asyncio.subprocess.Process, within_s: float) -> None:
    """Wait until a process has ended; one that has not in that time is killed with its whole group."""
    try:
        async with asyncio.timeout(within_s):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none yet."""
    return path.stat().st_size if path.exists() else 0
