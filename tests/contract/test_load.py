"""A small crowd against real coordinators: one of several processes, two on one database, killed and not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--nodes", "60", "--seconds", "4", "--rate", "20"]

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(240)]


def load(*arguments: str) -> dict[str, object]:
    """Run the benchmark, small, and give its figures."""
    command = [sys.executable, str(ROOT / "bench" / "coordinator.py"), *SMALL, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_coordinator_killed_under_load_loses_and_repeats_nothing() -> None:
    figures = load("--kills", "2")
    assert (figures["kills"], figures["acknowledged_and_lost"], figures["counted_twice"]) == (2, 0, 0), figures
    assert figures["acknowledged"] >= 50
    assert not [status for status in figures["statuses"] if status.split()[1] in ("500", "401")], figures["statuses"]


def test_nodes_go_on_when_one_of_two_coordinators_on_a_database_is_killed(new_postgres) -> None:
    figures = load("--kills", "1", "--replicas", "2", "--processes", "1", "--database", new_postgres())
    assert (figures["kills"], figures["acknowledged_and_lost"], figures["counted_twice"]) == (1, 0, 0), figures
    assert figures["acknowledged"] >= 50
