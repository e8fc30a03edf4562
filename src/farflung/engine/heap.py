"""Keeps freed memory in the process: to get a large tensor's pages anew takes as long as a matrix product.

glibc gives blocks above 32 MB back to the kernel as they are freed, and every page of the next one is a fault: one step
of a 135M model took 400,000 of them and 5.1 CPU-seconds, 4.1 without, for 6.3 GiB of memory instead of 5.1.
"""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
"""glibc's names for what `mallopt` sets; see its manual page."""


def keep_freed_memory() -> None:
    """Let this process use again what it frees, until it ends; call it before threads start. Only glibc needs it."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in ((_TRIM_THRESHOLD, -1), (_MMAP_MAX, 0), (_ARENA_MAX, 1)):
            libc.mallopt(parameter, value)
