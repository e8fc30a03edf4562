"""In lockstep a run is a function of its seed: kill -9 of the trainer changes nothing, not a bit of its weights."""

import sqlite3
import time

import pytest

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(400)]
SMALL = (
    *("--run.steps", "5", "--eval.tasks", "0", "--swarm.kill", "0", "--swarm.cheats", "[]", "--swarm.workers", "2"),
    *("--learn.groups", "4", "--learn.lockstep", "true", "--learn.max_staleness", "1", "--learn.checkpoint_every", "3"),
)
KILL_AFTER_S = (0.0, 0.7)
"""How long after a step was committed the trainer dies: while it fetches or trains, and while it publishes."""


def digests(folder):
    with sqlite3.connect(folder / "farflung.db") as database:
        rows = database.execute("SELECT step, weights_digest, seen_groups FROM steps ORDER BY step").fetchall()
    database.close()
    return rows


def test_a_killed_trainer_ends_with_the_digest_of_one_that_was_not(start, tmp_path):
    whole = start(*SMALL, "--run.dir", str(tmp_path / "whole"))
    whole.folder = tmp_path / "whole" / "test"
    output = whole.finish()
    assert whole.process.returncode == 0, output
    killed = start(*SMALL, "--run.dir", str(tmp_path / "killed"))
    killed.folder = tmp_path / "killed" / "test"
    for number, wait_s in enumerate(KILL_AFTER_S):
        killed.wait_for(lambda status, least=1 + 2 * number: status["latest"]["step"] >= least)
        time.sleep(wait_s)
        killed.kill("trainer")
    output = killed.finish()
    assert killed.process.returncode == 0, output
    assert output.count("trainer ended with -9") == len(KILL_AFTER_S)
    assert len(digests(whole.folder)) == 6
    assert digests(killed.folder) == digests(whole.folder)
    assert all(groups >= 4 for step, _, groups in digests(whole.folder) if step)
    log = (killed.folder / "logs" / "trainer.log").read_text()
    assert "replayed step=" in log
