"""A stranger joins in the middle of a run with nothing but the address, and leaves before its end."""

import os
import re
import signal
import stat
import subprocess
import sys
import time

import httpx2
import pytest

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(400)]


def test_a_stranger_joins_works_leaves_and_is_told_what_it_earned(start, tmp_path):
    running = start(
        "--run.steps",
        "8",
        "--learn.groups",
        "8",
        "--eval.tasks",
        "64",
        "--eval.samples",
        "0",
        "--swarm.workers",
        "2",
        "--swarm.kill",
        "0",
        "--swarm.relays",
        "1",
    )
    running.wait_for(lambda status: status["latest"]["step"] >= 1)
    folder = tmp_path / "home"
    command = [sys.executable, "-m", "farflung", "join", running.url, "--folder", str(folder), "--name", "stranger"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as joined:
        running.wait_for(lambda status: any(n["name"] == "stranger" and n["accepted"] > 0 for n in status["nodes"]))
        versions = httpx2.get(f"{running.url}/v1/runs/test/weights", timeout=5, trust_env=False).json()["versions"]
        os.kill(joined.pid, signal.SIGTERM)
        since = time.monotonic()
        told, errors = joined.communicate(timeout=30)
        assert time.monotonic() - since < 20
    assert joined.returncode == 0, errors
    step, anchor, held, size_bytes = re.findall(r"fetching step=(\d+) from=(\d+) held=(\w+) bytes=(\d+)", errors)[0]
    by_step = {version["step"]: version for version in versions}
    chain = sum(by_step[between]["delta_bytes"] for between in range(int(anchor) + 1, int(step) + 1))
    assert held == "False"
    assert int(size_bytes) == by_step[int(anchor)]["anchor_bytes"] + chain, "one anchor and its chain, no more"
    assert "✗" not in told
    assert "stranger leaves with" in told
    assert "accepted rollouts (0 rejected)" in told
    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600
    output = running.finish()
    assert running.process.returncode == 0, output
    assert running.summary()["nodes_seen"] == 4
