"""What nodes and an operator may do in the middle of a run: join, lend a port, leave, and rotate a key."""

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time

import httpx2
import pytest

from farflung.protocol.digest import digest_of
from farflung.tasks import keyring

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(400)]
LONG = (  # it is stopped once all has been seen
    *("--run.steps", "400", "--learn.groups", "4", "--eval.tasks", "0", "--swarm.workers", "2", "--swarm.kill", "0"),
    *("--swarm.cheats", "[]", "--swarm.relays", "0", "--generate.samples", "8"),
    *("--worker.pace_tokens_per_s", "100"),  # the cores are for others
)


def farflung(*words):
    return subprocess.Popen(
        [sys.executable, "-m", "farflung", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_nodes_join_and_leave_and_a_weights_key_is_rotated_while_the_run_goes_on(start, tmp_path):
    running = start(*LONG)
    running.wait_for(lambda status: status["latest"]["step"] >= 0)
    port, home, folder = free_port(), tmp_path / "home", tmp_path / "stranger"
    command = ("worker", running.url, "--folder", str(home), "--name", "lender", "--relay-port", str(port))
    with (
        farflung(*command, "--relay-url", f"http://127.0.0.1:{port}") as lender,
        farflung("join", running.url, "--folder", str(folder), "--name", "stranger") as stranger,
    ):
        for name in ("lender", "stranger"):
            running.wait_for(lambda status, name=name: accepted(status, name) > 0)
        check_serves(running, port, home / "relay" / "weights")
        versions = httpx2.get(f"{running.url}/v1/runs/test/weights", timeout=5, trust_env=False).json()["versions"]
        leave(lender)
        told, errors = leave(stranger)
    check_joined(told, errors, versions)
    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600
    rotate_weights_key(running)
    step = running.wait_for(lambda _: True)["latest"]["step"]
    status = running.wait_for(lambda status: status["latest"]["step"] >= step + 2)
    running.process.terminate()
    output = running.finish()
    assert running.process.returncode == 130, output
    assert {node["name"] for node in status["nodes"]} >= {"lender", "stranger"}
    summary = running.summary()
    assert (summary["honest_ejected"], summary["nodes_seen"]) == (0, 4)


def accepted(status, name):
    return sum(node["accepted"] for node in status["nodes"] if node["name"] == name)


def leave(node):
    """Tell a node to go; gives what it printed and logged."""
    os.kill(node.pid, signal.SIGTERM)
    since = time.monotonic()
    told, errors = node.communicate(timeout=60)
    assert time.monotonic() - since < 20
    assert node.returncode == 0, errors
    return told, errors


def check_joined(told, errors, versions):
    """With nothing but the address a stranger fetched an anchor and its chain, and was told what it earned."""
    step, anchor, held, size_bytes = re.findall(r"fetching step=(\d+) from=(\d+) held=(\w+) bytes=(\d+)", errors)[0]
    by_step = {version["step"]: version for version in versions}
    chain = sum(by_step[between]["delta_bytes"] for between in range(int(anchor) + 1, int(step) + 1))
    assert held == "False"
    assert int(size_bytes) == by_step[int(anchor)]["anchor_bytes"] + chain, "one anchor and its chain, no more"
    assert "✗" not in told
    assert "stranger leaves with" in told
    assert "accepted rollouts (0 rejected)" in told


def check_serves(running, port, folder):
    """The worker's relay is listed, and what it mirrored comes back right."""
    relays = httpx2.get(f"{running.url}/v1/runs/test/relays", timeout=5, trust_env=False).json()["relays"]
    assert [relay["url"] for relay in relays] == [f"http://127.0.0.1:{port}"]
    mirrored = next(file for file in folder.iterdir() if len(file.name) == 64 and file.is_file())
    served = httpx2.get(f"http://127.0.0.1:{port}/v1/blobs/{mirrored.name}", timeout=5, trust_env=False).content
    assert digest_of(served) == mirrored.name


def rotate_weights_key(running):
    """As an operator does it: another key by the command, then coordinator and trainer start again."""
    config = running.folder / "config.json"
    private = running.folder / "keys" / "trainer"
    before = private.read_bytes()
    with farflung("keys", "rotate", str(config), "--purpose", "weights") as rotating:
        errors = rotating.communicate(timeout=60)[1]
    assert rotating.returncode == 0, errors
    assert private.read_bytes() != before
    ring = keyring.read(running.folder / "keys")
    assert ring is not None
    publics = {one.public for one in ring.delegations() if one.purpose == "weights"}
    assert len(publics) == 2, "the old key stays good for what it sealed"
    running.kill("coordinator")
    running.kill("trainer")
