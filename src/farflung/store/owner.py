"""The owner of a folder: a lock in it that a process holds as long as it lives, and that names the process.

A run has its folder alone. Roles that are started by hand share the folder of their run, each with a part of its own.
The lock is the kernel's (flock), so nothing is left of it when its owner dies, however that happens.
"""

import errno
import json
import logging
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from farflung.protocol.errors import ConfigError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

log = logging.getLogger(__name__)
NAME = "owner.lock"
REMAINS_S = 20.0
"""How long the processes of an owner that died may take to end."""
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of file systems that have no locks."""
_held: dict[Path, int] = {}
"""Descriptors of the locks of this process, by the file's path."""


def own(folder: Path, part: str = "", *, is_shared: bool = False) -> None:
    """Own a folder, or a named part of what is in it, until this process ends; once more is no error.

    A shared owner keeps out a process that wants it alone. Raises ConfigError, which names the owner, if it is taken.
    """
    path = (folder / (f"{part}-{NAME}" if part else NAME)).resolve()
    if fcntl is None or path in _held:
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _lock(descriptor, folder, part, fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX)
    except BaseException:
        os.close(descriptor)
        raise
    _held[path] = descriptor
    _sign(descriptor)


def held(folder: Path) -> tuple[int, ...]:
    """The descriptor of this process's lock on a folder, for children that are to hold it as well."""
    descriptor = _held.get((folder / NAME).resolve())
    return () if descriptor is None else (descriptor,)


def _lock(descriptor: int, folder: Path, part: str, how: int) -> None:
    assert fcntl is not None, "where there are no locks no caller asks"
    until = time.monotonic() + REMAINS_S
    while True:
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in NO_LOCKS:
                log.warning("%s has no locks, so that nothing keeps two runs out of it", folder)
                return
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        owner = _owner(descriptor)
        if _is_alive(owner) or time.monotonic() > until:
            what = f"{part} in {folder}" if part else str(folder)
            raise ConfigError(f"{what} is in use by {_shown(owner)}; end it first, or name another folder")
        time.sleep(0.1)  # an owner that was killed leaves processes that are about to end


def _sign(descriptor: int) -> None:
    """Write down the owner. A disk that is too full for that is no reason not to."""
    said = {"pid": os.getpid(), "host": socket.gethostname(), "command": _command(), "since": time.time()}
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(said).encode() + b"\n", 0)
    except OSError as error:
        log.warning("the owner's name cannot be written because=%s", error)


def _command() -> str:
    return " ".join(["farflung", *sys.argv[1:]])[:200]


def _owner(descriptor: int) -> dict[str, Any]:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}  # type: ignore[reportUnknownVariableType]


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether the process that signed still runs; of another machine, or unsigned, it is taken to."""
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid <= 0 or owner.get("host") != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _shown(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(owner.get("since") or 0)))
    return f"`{owner.get('command')}` (process {owner.get('pid')} on {owner.get('host')}, since {since})"
