"""A disk of a few bytes that ends with this process, also when it is killed: no other process sees the mount."""

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CLONE_NEWNS = 0x00020000  # Linux


def _mount(*arguments: object) -> bool:
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode == 0


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Callable[[int], None]]:
    """Mount a file system of that size at a new folder; yields a function that gives it another size.

    Skips the test where mounting is not permitted.
    """
    folder.mkdir()
    is_apart = ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0 and _mount("--make-rprivate", "/")
    if not is_apart or not _mount("-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", folder):
        pytest.skip("mounting is not permitted here")

    def resize(size_bytes: int) -> None:
        assert _mount("-o", f"remount,size={size_bytes}", folder)

    try:
        yield resize
    finally:
        subprocess.run(["umount", str(folder)], check=True)
