"""A D-Bus of a test's own, with a logind and a NetworkManager that say what the test wants."""

import contextlib
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

jeepney = pytest.importorskip("jeepney")
from jeepney.bus_messages import message_bus  # noqa: E402
from jeepney.io.blocking import open_dbus_connection  # noqa: E402
from jeepney.low_level import MessageType  # noqa: E402

CONFIG = """<busconfig><type>system</type><listen>unix:path={socket}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*"/><allow own="*"/><allow eavesdrop="true"/></policy></busconfig>
"""
SERVICES = ("org.freedesktop.login1", "org.freedesktop.NetworkManager")


class FakeBus:
    """Answers for both services until it is closed."""

    def __init__(self, folder: Path) -> None:
        self.address = f"unix:path={folder / 'bus'}"
        (folder / "bus.conf").write_text(CONFIG.format(socket=folder / "bus"))
        command = ["dbus-daemon", f"--config-file={folder / 'bus.conf'}", "--nofork", "--nopidfile"]
        self._daemon = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not (folder / "bus").exists():
            assert self._daemon.poll() is None
            time.sleep(0.01)
        self.properties: dict[str, tuple[str, Any]] = {"Metered": ("u", 4)}
        self.is_odd = False
        """Whether it answers with another type than it should."""
        self.set_idle(0.0)
        self._connection = open_dbus_connection(bus=self.address)
        for name in SERVICES:
            self._connection.send_and_get_reply(message_bus.RequestName(name))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def set_idle(self, since_s: float | None) -> None:
        """How long all sessions are idle by now; None where one is not."""
        at_us = int((time.time() - (since_s or 0.0)) * 1e6)
        self.properties |= {"IdleHint": ("b", since_s is not None), "IdleSinceHint": ("t", at_us)}

    def close(self) -> None:
        """End it."""
        self._daemon.terminate()
        self._daemon.wait()
        self._thread.join()
        self._connection.close()

    def _serve(self) -> None:
        with contextlib.suppress(ConnectionResetError, EOFError, OSError):
            while True:
                asked = self._connection.receive()
                if asked.header.message_type == MessageType.method_call:
                    found = ("s", "odd") if self.is_odd else self.properties[asked.body[1]]
                    self._connection.send(jeepney.new_method_return(asked, "v", (found,)))


@pytest.fixture
def system_bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBus]:
    """A bus in the place of the system's for this process and those that it starts."""
    if shutil.which("dbus-daemon") is None:
        pytest.skip("dbus-daemon is not installed")
    found = FakeBus(tmp_path)
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", found.address)
    yield found
    found.close()


def seconds(log: str, pattern: str) -> list[float]:
    """Unix times of the lines of a log that have this."""
    stamp = re.compile(rf"^(\d+-\d+-\d+ \d+:\d+:\d+),(\d+) .*(?:{pattern})", re.MULTILINE)
    return [time.mktime(time.strptime(at, "%Y-%m-%d %H:%M:%S")) + int(ms) / 1000 for at, ms in stamp.findall(log)]
