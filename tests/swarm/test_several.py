"""One command, several processes under one key: a killed one is started again, the others go on, all end together."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(400)]
LONG = (
    *("--run.steps", "400", "--learn.groups", "4", "--eval.tasks", "0", "--swarm.workers", "1", "--swarm.kill", "0"),
    *("--swarm.cheats", "[]", "--swarm.relays", "0", "--generate.samples", "8", "--trust.probation_rollouts", "8"),
    *("--worker.pace_tokens_per_s", "200"),
)


def test_two_processes_of_one_node_share_key_and_weights(start, tmp_path) -> None:
    running = start(*LONG)
    running.wait_for(lambda status: status["latest"]["step"] >= 0)
    folder, log = tmp_path / "node", tmp_path / "node.log"
    words = ("worker", running.url, "--folder", str(folder), "--name", "pair", "--processes", "2", "--device", "cpu")
    with log.open("w") as sink:
        node = subprocess.Popen([sys.executable, "-m", "farflung", *words], stderr=sink)
    try:
        running.wait_for(lambda _: devices_at_work(running.folder) == {0, 1})
        killed = pids(log)[1]
        os.kill(killed, signal.SIGKILL)
        before = accepted(running.status())
        running.wait_for(lambda status: accepted(status) > before)
        running.wait_for(lambda _: pids(log)[1] != killed and submitted_since(log, pids(log)[1]))
        assert "in two places at once" not in log.read_text()
        children = [pid for pid in pids(log).values() if is_alive(pid)]
        assert len(children) == 2
        node.send_signal(signal.SIGTERM)
        assert node.wait(60) == 0, log.read_text()[-2000:]
        assert not any(map(is_alive, children))
    finally:
        node.kill()
        node.wait()
    fetched = re.findall(r"fetching step=(\d+) from=\d+ held=\w+ bytes=([1-9]\d*)", log.read_text())
    steps = [step for step, _ in fetched]
    assert len(steps) <= len(set(steps)) + 1, "no version was fetched by both, but one that a killed process was at"
    pair = next(one for one in running.status()["nodes"] if one["name"] == "pair")
    assert (pair["status"], pair["rejected"]) == ("trusted", 0)


def accepted(status) -> int:
    return sum(node["accepted"] for node in status["nodes"] if node["name"] == "pair")


def devices_at_work(folder: Path) -> set[int]:
    """Devices of the node from which work was taken in."""
    query = """SELECT DISTINCT device FROM leases JOIN nodes ON nodes.node = leases.node
               WHERE nodes.name = 'pair' AND leases.status = 'submitted'"""
    with sqlite3.connect(f"file:{folder / 'farflung.db'}?mode=ro", uri=True) as database:
        return {row[0] for row in database.execute(query)}


def pids(log: Path) -> dict[int, int]:
    """The latest process of each part."""
    return {int(part): int(pid) for part, pid in re.findall(r"started process=(\d) .* pid=(\d+)", log.read_text())}


def submitted_since(log: Path, pid: int) -> bool:
    """Whether work was handed in after this process had started."""
    return log.read_text().partition(f"pid={pid}")[2].count("submitted lease=") > 2


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
