"""kill -9 of the trainer at random moments of a run in lockstep: does it end with the bits of a run left alone?

    python bench/lockstep.py [--quick] [--kills 20] [--seed 0]

Runs the demo's model in lockstep once undisturbed, then again while its trainer is killed at random moments, and
compares the digest of every step. Then once more without lockstep, with kills: there each replayed step must come to
its own recorded digest, or the trainer stops. Prints one JSON object as its last line.
`--quick` kills 4 times in 6 steps; the full command is `python bench/lockstep.py`.
"""

import argparse
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASE = ("--eval.tasks", "0", "--swarm.kill", "0", "--swarm.cheats", "[]", "--swarm.workers", "1")
LEARN = ("--learn.groups", "4", "--learn.max_staleness", "1", "--learn.checkpoint_every", "4")
LOCKSTEP = ("--learn.lockstep", "true")
LONGEST_S = 3000.0


def say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%X')} {text}\n")


def run(folder: Path, steps: int, kills: int, rng: random.Random, flags: tuple[str, ...]) -> dict[str, object]:
    """One run; gives its digests, how often its trainer was killed, and what the trainer replayed."""
    command = [sys.executable, "-m", "farflung", "run", str(ROOT / "examples" / "demo.toml"), "--plain"]
    where = ("--run.dir", str(folder.parent), "--run.name", folder.name, "--run.steps", str(steps))
    process = subprocess.Popen([*command, *where, *BASE, *LEARN, *flags], stdout=subprocess.PIPE, text=True)
    try:
        killed = _kill_often(process, folder, steps, kills, rng)
        process.communicate(timeout=LONGEST_S)
    finally:
        process.terminate()
    log = (folder / "logs" / "trainer.log").read_text()
    return {
        "code": process.returncode,
        "kills": killed,
        "replayed": log.count("replayed step="),
        "refused": log.count("it was committed with"),
        "digests": _digests(folder),
    }


def _kill_often(process: subprocess.Popen[str], folder: Path, steps: int, kills: int, rng: random.Random) -> int:
    """Kill the trainer so often, spread over the run: each time at a random moment of a random share of its steps."""
    due = sorted(rng.uniform(0, steps - 1) for _ in range(kills))
    killed, last = 0, 0
    while killed < kills and process.poll() is None:
        done, pid = _committed(folder), _trainer(folder)
        if done >= due[killed] and pid and pid != last:
            time.sleep(rng.uniform(0, 4))
            os.kill(pid, signal.SIGKILL)
            killed, last = killed + 1, pid
            say(f"{folder.parent.name}: killed the trainer ({killed} of {kills}) after step {done}")
        time.sleep(0.2)
    return killed


def _committed(folder: Path) -> int:
    rows = _digests(folder)
    return max((step for step, digest in rows if digest), default=-1)


def _digests(folder: Path) -> list[tuple[int, str]]:
    try:
        with sqlite3.connect(f"file:{folder / 'farflung.db'}?mode=ro", uri=True, timeout=30) as database:
            return database.execute("SELECT step, weights_digest FROM steps ORDER BY step").fetchall()
    except sqlite3.OperationalError:  # not there yet
        return []


def _trainer(folder: Path) -> int:
    """The process that writes the trainer's log; 0 if none does."""
    log = str((folder / "logs" / "trainer.log").resolve())
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _writes_to(entry, log):
            return int(entry.name)
    return 0


def _writes_to(process: Path, log: str) -> bool:
    try:
        return os.readlink(process / "fd" / "2") == log
    except OSError:
        return False


def main() -> int:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="4 kills in 6 steps")
    made.add_argument("--kills", type=int, default=20)
    made.add_argument("--steps", type=int, default=16)
    made.add_argument("--seed", type=int, default=0)
    asked = made.parse_args()
    steps, kills = (6, 4) if asked.quick else (asked.steps, asked.kills)
    rng = random.Random(asked.seed)
    with tempfile.TemporaryDirectory(prefix="farflung-lockstep-") as scratch:
        # One name for all: the ids of tasks, and so the seeds of their samples, depend on it.
        whole = run(Path(scratch) / "whole" / "run", steps, 0, rng, LOCKSTEP)
        killed = run(Path(scratch) / "killed" / "run", steps, kills, rng, LOCKSTEP)
        free = run(Path(scratch) / "free" / "run", steps, max(2, kills // 4), rng, ())
    found = {
        "steps": steps,
        "kills": killed["kills"],
        "replayed": killed["replayed"],
        "same_digest": killed["digests"] == whole["digests"] and len(whole["digests"]) == steps + 1,
        "free_kills": free["kills"],
        "free_replayed": free["replayed"],
        "free_refused": free["refused"],
        "codes": [whole["code"], killed["code"], free["code"]],
    }
    sys.stdout.write(json.dumps(found) + "\n")
    return 0 if found["same_digest"] and not free["refused"] and not any(found["codes"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
