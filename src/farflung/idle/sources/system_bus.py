"""Properties of the system's services over D-Bus: logind's idle hint, NetworkManager's meter."""

import contextlib
import time
from typing import Any

from farflung.idle.sources import WITH_EXTRA, Missing

PATIENCE_S = 0.5
REFUSED = "org.freedesktop.DBus.Error."
METERED, GUESSED_METERED = 1, 3
"""NetworkManager's words; 2 and 4 say that it is not, 0 that it is not known."""


class SystemBus:
    """One connection, opened when it is needed, and again after it broke."""

    def __init__(self) -> None:
        self._connection: Any = None

    def read(self, service: str, path: str, interface: str, name: str, kind: str) -> Any | Missing:
        """A property of this D-Bus type, such as `b`."""
        try:
            from jeepney import DBusAddress, Properties
            from jeepney.io.blocking import open_dbus_connection
        except ImportError:
            return Missing("the package jeepney is not installed", WITH_EXTRA)
        try:
            self._connection = self._connection or open_dbus_connection(bus="SYSTEM")
            asked = Properties(DBusAddress(path, service, interface)).get(name)
            answer = self._connection.send_and_get_reply(asked, timeout=PATIENCE_S)
        except Exception as error:  # noqa: BLE001 (whatever this library meets: no bus, a timeout, another's bytes)
            self.close()
            return Missing(f"the system bus does not answer: {error!r}")
        return _value(answer.body, kind, service)

    def close(self) -> None:
        """Let go of the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.close()


def _value(body: Any, kind: str, service: str) -> Any | Missing:
    match body:
        case ((str(found), value),) if found == kind:
            return value
        case (str(why), *_):
            return Missing(f"{service}: {why[:120]}")
        case _:
            return Missing(f"{service} answers {str(body)[:80]}, not a value of type {kind!r}")


class Logind:
    """Seconds since the last input of any session, as systemd-logind says it."""

    ABOUT = ("org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager")

    def __init__(self, bus: SystemBus) -> None:
        self._bus = bus

    def __call__(self) -> float | Missing:
        """0 while it does not hint that all are idle."""
        is_idle = self._bus.read(*self.ABOUT, "IdleHint", "b")
        if isinstance(is_idle, Missing):
            return is_idle
        since_us = self._bus.read(*self.ABOUT, "IdleSinceHint", "t") if is_idle else 0
        if isinstance(since_us, Missing):
            return since_us
        return max(0.0, time.time() - since_us / 1e6) if is_idle else 0.0


class MeteredNetwork:
    """Whether the way out is paid for by volume, as NetworkManager says or guesses."""

    ABOUT = ("org.freedesktop.NetworkManager", "/org/freedesktop/NetworkManager", "org.freedesktop.NetworkManager")

    def __init__(self, bus: SystemBus) -> None:
        self._bus = bus

    def __call__(self) -> float | Missing:
        """1 where it is."""
        found = self._bus.read(*self.ABOUT, "Metered", "u")
        return found if isinstance(found, Missing) else float(found in (METERED, GUESSED_METERED))
