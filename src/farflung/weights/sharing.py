"""Worker: a folder of weights that several processes share. One fetches at a time, and each says what it wants.

Both are locks of the kernel (flock), so a process that is killed holds up no other, and what it wanted is let go of.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from farflung.protocol.errors import ConfigError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

FETCHING, WANTED, LIST = ".fetching", ".wanted-", ".json"
LOOK_S = 0.05
"""Seconds between two tries for the lock."""


class Sharing:
    """The part of one process in a folder that it shares; `part` names it among the others."""

    def __init__(self, folder: Path, part: int) -> None:
        """Raises ConfigError where there are no such locks, or another process has this part."""
        self._folder, self._list = folder, folder / f"{WANTED}{part}{LIST}"
        self._fetching, self._held = _opened(folder / FETCHING), 0
        self._life = _opened(folder / f"{WANTED}{part}")
        if not _try_lock(self._life):
            raise ConfigError(f"another process is part {part} of those that share {folder}; end it first")
        self.want(())

    def want(self, names: Iterable[str]) -> None:
        """Say which files this process has a use for."""
        draft = self._list.with_suffix(".part")
        draft.write_text(json.dumps(sorted(set(names))))
        draft.replace(self._list)

    def wanted_by_others(self) -> set[str]:
        """Files that the other processes that live have a use for."""
        lists = (path for path in self._folder.glob(f"{WANTED}*{LIST}") if path != self._list)
        return {name for path in lists if _is_alive(path.with_suffix("")) for name in json.loads(path.read_bytes())}

    def try_alone(self) -> bool:
        """Whether this process is now the only one that changes the folder, until it has let go as often."""
        if not self._held and not _try_lock(self._fetching):
            return False
        self._held += 1
        return True

    def let_go(self) -> None:
        """Let others change the folder."""
        self._held -= 1
        if not self._held:
            _unlock(self._fetching)

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Wait for the others, then be the only one that changes the folder."""
        while not self.try_alone():
            await asyncio.sleep(LOOK_S)
        try:
            yield
        finally:
            self.let_go()

    def close(self) -> None:
        """Share no more."""
        os.close(self._fetching)
        os.close(self._life)


def _opened(path: Path) -> int:
    if fcntl is None:
        raise ConfigError("several processes share weights by locks that this system has not; join with --processes 1")
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _try_lock(descriptor: int) -> bool:
    assert fcntl is not None, "it was opened"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(descriptor: int) -> None:
    assert fcntl is not None, "it was opened"
    fcntl.flock(descriptor, fcntl.LOCK_UN)


def _is_alive(life: Path) -> bool:
    """Whether the process that holds this lock as long as it lives still does."""
    descriptor = _opened(life)
    try:
        return not _try_lock(descriptor)
    finally:
        os.close(descriptor)
