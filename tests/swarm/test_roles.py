"""What an operator and a node's owner may do in the middle of a run: rotate a key, lend a port."""

import os
import signal
import socket
import subprocess
import sys

import httpx2
import pytest

from farflung.protocol.digest import digest_of
from farflung.tasks import keyring

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(400)]
SMALL = (
    "--learn.groups",
    "8",
    "--eval.tasks",
    "64",
    "--swarm.workers",
    "2",
    "--swarm.kill",
    "0",
    "--swarm.cheats",
    "[]",
    "--swarm.relays",
    "0",
)


def farflung(*words, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "farflung", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        **options,
    )  # fmt: skip


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_a_worker_lends_its_port_and_a_weights_key_is_rotated_while_the_run_goes_on(start, tmp_path):
    running = start(*SMALL, "--run.steps", "6")
    running.wait_for(lambda status: status["latest"]["step"] >= 0)
    port, home = free_port(), tmp_path / "home"
    command = ("worker", running.url, "--folder", str(home), "--name", "lender", "--relay-port", str(port))
    with farflung(*command, "--relay-url", f"http://127.0.0.1:{port}") as lender:
        running.wait_for(lambda status: any(n["name"] == "lender" and n["accepted"] > 0 for n in status["nodes"]))
        check_serves(running, port, home / "relay" / "weights")
        os.kill(lender.pid, signal.SIGTERM)
        told, _ = lender.communicate(timeout=60)
    assert lender.returncode == 0, told
    rotate_weights_key(running)
    output = running.finish()
    assert running.process.returncode == 0, output
    summary = running.summary()
    assert (summary["steps"], summary["honest_ejected"]) == (6, 0)
    assert summary["eval_after"] > summary["eval_before"]


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
        told, _ = rotating.communicate(timeout=60)
    assert rotating.returncode == 0, told
    assert private.read_bytes() != before
    ring = keyring.read(running.folder / "keys")
    assert ring is not None
    publics = {one.public for one in ring.delegations() if one.purpose == "weights"}
    assert len(publics) == 2, "the old key stays good for what it sealed"
    running.kill("coordinator")
    running.kill("trainer")
