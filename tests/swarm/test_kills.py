"""kill -9 of trusted roles in the middle of a run: nothing accepted is lost, nothing is counted twice."""

import sqlite3

import pytest

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(400)]
SMALL = (
    *("--run.steps", "9", "--learn.groups", "4", "--eval.tasks", "64", "--eval.samples", "0"),
    *("--swarm.kill", "0", "--swarm.cheats", "[]", "--learn.checkpoint_every", "3", "--coordinator.claim_s", "2"),
    *("--swarm.workers", "2"),
)


def _accepted(status):
    return status["accepted"]


def _one(folder, query):
    with sqlite3.connect(folder / "farflung.db") as database:
        row = database.execute(query).fetchone()
    database.close()
    return row[0]


def check_books(folder):
    """What must hold in every database at the end of a run."""
    lost = """SELECT count(*) FROM events e JOIN rollouts r ON r.rollout = e.subject
              WHERE e.after = 'accepted' AND r.status NOT IN ('accepted', 'batched', 'trained', 'dropped')"""
    assert _one(folder, lost) == 0
    twice = """SELECT count(*) FROM (SELECT subject FROM events
               WHERE noun = 'rollout' AND after IN ('accepted', 'trained')
               GROUP BY subject, after HAVING count(*) > 1)"""
    assert _one(folder, twice) == 0
    owners = """SELECT count(*) FROM (SELECT 1 FROM rollouts WHERE status IN ('accepted', 'batched', 'trained')
                GROUP BY "group", sample HAVING count(*) > 1)"""
    assert _one(folder, owners) == 0
    paid_twice = (
        "SELECT count(*) FROM (SELECT 1 FROM entries WHERE account = 'issued' GROUP BY cause HAVING count(*) > 1)"
    )
    assert _one(folder, paid_twice) == 0
    assert _one(folder, "SELECT coalesce(sum(tokens), 0) FROM entries") == 0


def test_every_trusted_role_is_killed_in_turn_then_all_are_stopped_and_nothing_is_lost(start):
    running = start(*SMALL)
    running.wait_for(lambda status: status["latest"]["step"] >= 1)
    running.kill("validator-1")
    running.kill("scorer")
    running.wait_for(lambda status: status["latest"]["step"] >= 2)
    running.kill("trainer")
    before = running.wait_for(lambda status: status["latest"]["step"] >= 3)
    workers = {f"worker-{number}": running.pid(f"worker-{number}") for number in (1, 2)}
    running.kill("coordinator")
    after = running.wait_for(lambda status: status["latest"]["step"] > before["latest"]["step"])
    assert _accepted(after) >= _accepted(before)
    assert {name: running.pid(name) for name in workers} == workers, "workers must survive the coordinator"
    running.kill("forkserver-light")
    running.wait_for(lambda status: status["latest"]["step"] >= 5)
    running.process.terminate()
    output = running.finish()
    assert running.process.returncode == 130, output
    assert "forkserver-light ended, starting it again" in output
    for role in ("validator-1", "scorer", "trainer", "coordinator"):
        assert f"{role} ended with -9, starting it again" in output
    log = (running.folder / "logs" / "trainer.log").read_text()
    assert "replayed step=" in log, "the steps since the checkpoint are replayed to their recorded weights"
    running = start(*SMALL, resume=True)
    output = running.finish()
    assert running.process.returncode == 0, output
    summary = running.summary()
    assert (summary["steps"], summary["honest_ejected"]) == (9, 0)
    assert summary["eval_after"] > summary["eval_before"]
    check_books(running.folder)
