"""A real run is rolled back while it goes: the next step has the earlier weights, bit for bit, and it ends well."""

import sqlite3
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(400)]
SMALL = (
    "--run.steps",
    "6",
    "--learn.groups",
    "8",
    "--eval.tasks",
    "64",
    "--eval.samples",
    "0",
    "--swarm.kill",
    "0",
    "--swarm.cheats",
    "[]",
    "--swarm.workers",
    "3",
)


def test_a_run_takes_up_an_earlier_step_and_does_without_a_node(start):
    run = start(*SMALL)
    status = run.wait_for(lambda s: s["latest"]["step"] >= 2)
    worker = next(node for node in status["nodes"] if node["name"] == "worker-1")
    command = [sys.executable, "-m", "farflung", "rollback", str(run.folder / "config.json"), "--to-step", "1"]
    done = subprocess.run([*command, "--without", worker["node"]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "takes up step 1 again, without" in done.stdout
    output = run.finish(200)
    assert run.process.returncode == 0, output
    with sqlite3.connect(run.folder / "farflung.db") as database:
        restored = dict(database.execute("SELECT step, weights_digest FROM steps").fetchall())
        (step, target) = database.execute("SELECT step, restores FROM steps WHERE restores IS NOT NULL").fetchone()
        ejected = [row[0] for row in database.execute("SELECT name FROM nodes WHERE status = 'ejected'")]
        later = database.execute(
            """SELECT count(*) FROM rollouts r JOIN groups g ON g."group" = r."group"
               WHERE r.status = 'trained' AND g.batch_step > ? AND r.node = ?""",
            (step, worker["node"]),
        ).fetchone()[0]
    database.close()
    assert (target, restored[step]) == (1, restored[1])
    assert len(set(restored.values())) == len(restored) - 1, "every other step has weights of its own"
    assert (ejected, later) == (["worker-1"], 0)
