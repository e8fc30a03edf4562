"""Seconds since a key or the mouse was touched: X11, terminals, macOS, Windows."""

import contextlib
import ctypes
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from farflung.idle.sources import WITH_EXTRA, Missing, Source

PATIENCE_S, AGAIN_S = 2.0, 60.0
DEV = Path("/dev")
HID_IDLE = re.compile(rb'"HIDIdleTime" = (\d{1,20})\b')


class X11:
    """The X server's screen saver, which counts from the last input."""

    def __init__(self) -> None:
        self._display: Any = None
        self._failure, self._failed_at_s = Missing(""), -math.inf

    def __call__(self) -> float | Missing:
        """Seconds by the server's own count; one that failed is tried again after a while."""
        if not os.environ.get("DISPLAY"):
            return Missing("DISPLAY is not set")
        if time.monotonic() - self._failed_at_s < AGAIN_S:
            return self._failure
        found = self._ask_server()
        if isinstance(found, Missing):
            self._failure, self._failed_at_s = found, time.monotonic()
        return found

    def _ask_server(self) -> float | Missing:
        try:
            from Xlib.display import Display
            from Xlib.ext import screensaver  # noqa: F401 (it comes with the library; the server may lack it)
        except ImportError:
            return Missing("the package python-xlib is not installed", WITH_EXTRA)
        try:
            self._display = self._display or Display()
            return self._display.screen().root.screensaver_query_info().idle / 1000
        except Exception as error:  # noqa: BLE001 (whatever this library meets: no server, none of our rights)
            self.close()
            return Missing(f"the X server at {os.environ['DISPLAY']} does not tell: {error!r}"[:200])

    def close(self) -> None:
        """Let go of the server, which may have gone itself."""
        display, self._display = self._display, None
        with contextlib.suppress(Exception):
            display.close()


def terminals() -> float | Missing:
    """The terminal that was typed at last, of those with a login."""
    try:
        times = [path.stat().st_atime for path in map(_device, psutil.users()) if path and path.exists()]
    except OSError as error:
        return Missing(f"terminals cannot be looked at: {error.strerror}")
    return max(0.0, time.time() - max(times)) if times else Missing("no terminal has a login")


def _device(user: Any) -> Path | None:
    name = user.terminal or ""
    return DEV / name if re.fullmatch(r"(pts/|tty)\w+", name) else None


def macos() -> float | Missing:
    """What the input devices of a Mac say, in nanoseconds."""
    if sys.platform != "darwin":
        return Missing("this is no macOS")
    try:
        told = subprocess.run(
            ["/usr/sbin/ioreg", "-c", "IOHIDSystem", "-d", "4"], capture_output=True, timeout=PATIENCE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Missing(f"ioreg does not answer: {error}")
    found = HID_IDLE.search(told.stdout)
    return int(found[1]) / 1e9 if found else Missing("ioreg tells no HIDIdleTime")


class _LastInput(ctypes.Structure):
    _fields_ = (("size", ctypes.c_uint), ("tick_ms", ctypes.c_uint))


def windows() -> float | Missing:
    """The last input of this session of Windows, whose ticks of a millisecond go round after 49 days."""
    if sys.platform != "win32":
        return Missing("this is no Windows")
    found = _LastInput(ctypes.sizeof(_LastInput), 0)
    if not ctypes.windll.user32.GetLastInputInfo(ctypes.byref(found)):
        return Missing("GetLastInputInfo tells nothing")
    return (ctypes.windll.kernel32.GetTickCount() - found.tick_ms) % 2**32 / 1000


class UserIdle:
    """The shortest of what the sources of this platform say; logind, which hears late of input, where X11 is silent."""

    def __init__(self, logind: Source) -> None:
        self._logind, self._x11 = logind, X11()

    def close(self) -> None:
        """Let go of what is open."""
        self._x11.close()

    def each(self) -> dict[str, float | Missing]:
        """What each of them says."""
        if sys.platform == "darwin":
            return {"macos": macos(), "terminals": terminals()}
        if sys.platform == "win32":
            return {"windows": windows()}
        return {"x11": self._x11(), "logind": self._logind(), "terminals": terminals()}

    def __call__(self) -> float | Missing:
        """Seconds since the last input that any of them saw."""
        said = self.each()
        if not isinstance(said.get("x11", Missing("")), Missing):
            said.pop("logind")
        told = [one for one in said.values() if not isinstance(one, Missing)]
        whys = "; ".join(f"{name}: {one.why}" for name, one in said.items() if isinstance(one, Missing))
        mends = [one.mend for one in said.values() if isinstance(one, Missing) and one.mend]
        return min(told) if told else Missing(whys, *mends[:1])
