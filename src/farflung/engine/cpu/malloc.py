"""Keeps freed memory in the process: to get a large tensor's pages anew takes as long as a matrix product.

glibc gives blocks above 32 MB back to the kernel as they are freed, and every page of the next one is a fault: one step
of a 135M model took 400,000 of them and 5.1 CPU-seconds, 4.1 without, for 6.3 GiB of memory instead of 5.1.

Pages are large ones (2 MiB) where the kernel has them for those who ask: weights are read whole for every token, and
where to find half a million small pages has to be looked up as well.
"""

import ctypes
import gc
import mmap
import os
import platform
import sys
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
"""glibc's names for what `mallopt` sets; see its manual page."""
_LARGE = 1 << 21
"""Bytes of a large page."""
_SHARE = 2
"""Large pages are asked for as many bytes as the machine has, by this."""


def keep_freed_memory() -> None:
    """Let this process use again what it frees, until it ends; call it before threads start. Only glibc needs it."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in ((_TRIM_THRESHOLD, -1), (_MMAP_MAX, 0), (_ARENA_MAX, 1)):
            libc.mallopt(parameter, value)
        _ask_for_large_pages(libc)


def return_freed_memory() -> None:
    """Give the kernel, and the driver of an accelerator, what this process has freed after all."""
    gc.collect()
    for kind in ("cuda", "xpu", "mps"):
        module = getattr(sys.modules.get("torch"), kind, None)
        if module is not None and module.is_available():
            module.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _ask_for_large_pages(libc: ctypes.CDLL) -> None:
    """Of a block at the heap's end, freed before a page of it is touched, so that it costs addresses alone."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _SHARE
    start = None if _are_addresses_counted() else libc.malloc(size)
    if start is not None:
        first = -(-start // _LARGE) * _LARGE
        libc.madvise(first, (start + size - first) // _LARGE * _LARGE, mmap.MADV_HUGEPAGE)
        libc.free(start)


def _are_addresses_counted() -> bool:
    """Whether other processes could have less memory because this one might use what it only has addresses of."""
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    except OSError:
        return True
