"""A swarm of real processes over real sockets, started once for several tests, and small helpers around it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

ROOT = Path(__file__).parents[2]
WAIT_S, LOOK_S = 200.0, 0.25


class Running:
    """One `farflung run` and what one can do to it."""

    def __init__(self, folder: Path, *flags: str, resume: bool = False) -> None:
        self.folder = folder / "test"
        command = [sys.executable, "-m", "farflung", "run", str(ROOT / "examples" / "demo.toml"), "--plain"]
        command += ["--resume"] if resume else []
        settings = ["--run.dir", str(folder), "--run.name", "test", *flags]
        self.output = ""
        self.client = httpx2.Client(timeout=5, trust_env=False)
        self.process = subprocess.Popen(
            [*command, *settings], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    @property
    def url(self) -> str:
        """The coordinator's address."""
        return (self.folder / "coordinator.url").read_text().strip()

    def status(self) -> dict[str, Any] | None:
        """GET …/status, or None while nobody answers."""
        try:
            answer = self.client.get(f"{self.url}/v1/runs/test/status")
        except (OSError, httpx2.TransportError):
            return None
        return answer.json() if answer.status_code == 200 else None

    def wait_for(self, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first status for which something holds."""
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until and self.process.poll() is None:
            status = self.status()
            if status is not None and is_so(status):
                return status
            time.sleep(LOOK_S)
        pytest.fail(f"waited in vain, the run said:\n{self.finish()[-3000:]}")

    def kill(self, role: str) -> int:
        """kill -9 of one role's process, found by its parent and its command or log; gives its id."""
        pid = self.pid(role)
        os.kill(pid, signal.SIGKILL)
        return pid

    def pid(self, role: str) -> int:
        """The process that writes this role's log."""
        log = str((self.folder / "logs" / f"{role}.log").resolve())
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _writes_to(entry, log):
                return int(entry.name)
        pytest.fail(f"no process writes {log}")

    def finish(self, timeout_s: float = WAIT_S) -> str:
        """Wait for the end; gives all it printed."""
        if self.process.stdout is None or self.process.stdout.closed:
            return self.output
        self.client.close()
        try:
            self.output, _ = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.output, _ = self.process.communicate(timeout=30)
        return self.output

    def summary(self) -> dict[str, Any]:
        """summary.json."""
        return json.loads((self.folder / "summary.json").read_text())


def _writes_to(process: Path, log: str) -> bool:
    try:
        return os.readlink(process / "fd" / "2") == log
    except OSError:
        return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start runs in one folder; whatever still runs at the end of the test is stopped."""
    started: list[Running] = []

    def begin(*flags: str, resume: bool = False) -> Running:
        started.append(Running(tmp_path, *flags, resume=resume))
        return started[-1]

    yield begin
    for running in started:
        running.process.terminate()
        running.finish()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The demo as it ships but for fewer and smaller steps, run to its end."""
    fewer = ("--run.steps", "10", "--learn.groups", "8", "--eval.tasks", "128", "--eval.sampled_tasks", "8")
    running = Running(tmp_path_factory.mktemp("demo"), *fewer)
    running.finish()
    yield running
    assert running.process.returncode == 0, running.output
