"""Trainer: a full disk is waited out. Results stay in memory, and nothing that is half written stays."""

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
PAUSE_S, MOST_PAUSE_S, SAY_S = 0.25, 1.0, 60.0
"""Looks for room are so far apart at first and later; the log has a line so often."""


def is_full(error: BaseException | None) -> bool:
    """Whether an error comes from a disk, quota or file that is full; safetensors tells it in words alone."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(f"(os error {number})" in str(error) for number in FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


async def retry_when_disk_full(
    what: str, write: Callable[[], Awaitable[T]], say: Callable[[str], None], is_over: Callable[[], bool]
) -> T:
    """Do something that writes, again and again while the disk is full; `say` is told so, and "" once there is room.

    Whatever else goes wrong is raised, and so is a full disk when it is over.
    """
    waited_s, said_s, pause_s = 0.0, -SAY_S, PAUSE_S
    while True:
        try:
            result = await write()
        except Exception as error:
            if not is_full(error) or is_over():
                raise
            if waited_s - said_s >= SAY_S:
                said_s = waited_s
                log.warning("disk full, waiting for room to write %s because=%s", what, error)
            say(f"waits for room on its disk to write {what}: {error}"[:500])
        else:
            if waited_s:
                log.warning("there is room again, %s is written", what)
                say("")
            return result
        await asyncio.sleep(pause_s)
        waited_s, pause_s = waited_s + pause_s, min(2 * pause_s, MOST_PAUSE_S)
