"""What an operator and a node's owner may do in the middle of a run: rotate a key, lend a port."""

import os
import signal
import socket
import subprocess
import sys
from hashlib import sha256

import httpx2
import pytest

from farflung.config import load
from farflung.protocol.identity import node_id
from farflung.tasks import keyring

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(400)]
SMALL = ("--eval.tasks", "64", "--swarm.workers", "2", "--swarm.kill", "0", "--swarm.cheats", "[]")


def farflung(*words, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "farflung", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        **options,
    )  # fmt: skip


def test_a_weights_key_is_rotated_while_the_run_goes_on(start):
    running = start(*SMALL, "--run.steps", "6")
    running.wait_for(lambda status: status["latest"]["step"] >= 2)
    config = running.folder / "config.json"
    before = load(config, ()).folder / "keys" / "trainer"
    old = before.read_bytes()
    with farflung("keys", "rotate", str(config), "--purpose", "weights") as rotating:
        told, _ = rotating.communicate(timeout=60)
    assert rotating.returncode == 0, told
    assert before.read_bytes() != old
    running.kill("coordinator")
    running.kill("trainer")
    output = running.finish()
    assert running.process.returncode == 0, output
    summary = running.summary()
    assert (summary["steps"], summary["honest_ejected"]) == (6, 0)
    assert summary["eval_after"] > summary["eval_before"]
    ring = keyring.read(running.folder / "keys")
    assert ring is not None
    publics = {node_id(one.public) for one in ring.delegations() if one.purpose == "weights"}
    assert len(publics) == 2, "the old key stays good for what it sealed"


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_a_worker_with_an_open_port_passes_weights_on(start, tmp_path):
    running = start(*SMALL, "--run.steps", "6", "--swarm.relays", "0")
    running.wait_for(lambda status: status["latest"]["step"] >= 0)
    port, home = free_port(), tmp_path / "home"
    command = ("worker", running.url, "--folder", str(home), "--name", "lender", "--relay-port", str(port))
    with farflung(*command, "--relay-url", f"http://127.0.0.1:{port}") as lender:
        running.wait_for(lambda status: any(n["name"] == "lender" and n["accepted"] > 0 for n in status["nodes"]))
        relays = httpx2.get(f"{running.url}/v1/runs/test/relays", timeout=5, trust_env=False).json()["relays"]
        mirrored = [file for file in (home / "relay" / "weights").iterdir() if len(file.name) == 64 and file.is_file()]
        served = httpx2.get(f"{relays[0]['url']}/v1/blobs/{mirrored[0].name}", timeout=5, trust_env=False).content
        os.kill(lender.pid, signal.SIGTERM)
        told, _ = lender.communicate(timeout=60)
    assert lender.returncode == 0, told
    assert [relay["url"] for relay in relays] == [f"http://127.0.0.1:{port}"]
    assert sha256(served).hexdigest() == mirrored[0].name
    output = running.finish()
    assert running.process.returncode == 0, output
    assert running.summary()["honest_ejected"] == 0
