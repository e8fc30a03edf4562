"""The client in another language against a real coordinator: refusals are as docs/protocol.md says."""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(120)]
ROOT = Path(__file__).parents[2]
CLIENT = ROOT / "examples" / "js_client" / "client.mjs"
NODE = shutil.which("node")
PUBLISHED_S = 150.0

REFUSALS = {
    "ends too early": "422 rejected",
    "never ends": "422 rejected",
    "goes on after its end": "422 rejected",
    "beyond the vocabulary": "422 rejected",
    "one rollout is missing": "422 rejected",
    "somebody else's rollout": "422 rejected",
    "somebody else's lease": "403 forbidden",
    "truncated, then signed": "400 malformed",
    "signed, then truncated": "401 bad-signature",
    "a wrong signature": "401 bad-signature",
    "signed long ago": "401 clock-skew",
    "a key nobody knows": "404 not-found",
    "a role nobody granted": "403 forbidden",
    "no possession of the weights": "422 wrong-weights",
    "the same request again": "401 replayed",
    "the lease went to others": "409 lease-gone",
}


def _begin(role: str, folder: Path, port: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "farflung", role, str(ROOT / "examples" / "demo.toml")]
    with (folder / f"{role}.log").open("wb") as log:
        return subprocess.Popen(
            [*command, "--run.dir", str(folder / "runs"), "--coordinator.port", port],
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _log(folder: Path, role: str) -> str:
    return (folder / f"{role}.log").read_text()


def _wait(folder: Path, processes: list[subprocess.Popen[bytes]], is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + PUBLISHED_S
    while time.monotonic() < until and all(process.poll() is None for process in processes):
        if is_so():
            return
        time.sleep(0.1)
    pytest.fail("waited in vain:\n" + "".join(log.read_text()[-2000:] for log in folder.glob("*.log")))


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A coordinator whose trainer has published step 0, and nobody else."""
    if NODE is None:
        pytest.skip("the client in JavaScript needs `node` (20 or later) on the PATH")
    processes = [_begin("coordinator", tmp_path, "0")]
    try:
        _wait(tmp_path, processes, lambda: "listening url=" in _log(tmp_path, "coordinator"))
        found = re.search(r"listening url=(http://\S+)", _log(tmp_path, "coordinator"))
        assert found is not None
        processes.append(_begin("trainer", tmp_path, found[1].rpartition(":")[2]))
        latest = f"{found[1]}/v1/runs/demo/latest"
        _wait(tmp_path, processes, lambda: httpx2.get(latest, timeout=5, trust_env=False).json()["step"] == 0)
        yield found[1]
    finally:
        for process in reversed(processes):  # the trainer first; their folder is thrown away, so nobody need be gentle
            process.kill()
            process.wait()


@pytest.mark.timeout(300)
def test_a_client_in_javascript_is_refused_as_the_protocol_says(url: str) -> None:
    assert NODE is not None
    done = subprocess.run([NODE, str(CLIENT), url], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    got = dict(re.findall(r"^(.+?): (\d+ [a-z-]+): .+$", done.stdout, re.MULTILINE))
    assert got == REFUSALS
