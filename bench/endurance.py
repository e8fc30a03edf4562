"""A thousand steps while nodes come and go: what grows, and by how much?

    python bench/endurance.py [--quick] [--steps 1000] [--seed 0]

Runs the demo's model in very small steps. Beside its two workers strangers join, one at a time, work for some seconds
and leave: half of them in order, half by kill -9. Looks at the run's folder and its processes a hundred times, checks
the invariants at the end, and prints one JSON object as its last line: sizes in MB, each at a tenth of the steps, half
way and at the end.
`--quick` looks at 60 steps in the same way; the full command is `python bench/endurance.py`, which takes hours.
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
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import sqlalchemy as sa

from farflung.config import load
from farflung.ops.invariants import violations

ROOT = Path(__file__).parents[1]
FLAGS = (
    "--eval.tasks", "0", "--swarm.kill", "0", "--swarm.cheats", "[]", "--swarm.workers", "2", "--swarm.relays", "1",
    "--generate.samples", "4", "--generate.max_new_tokens", "24", "--learn.groups", "2", "--learn.lr", "1e-5",
    "--lease.rollouts", "4", "--learn.checkpoint_every", "20",
)  # fmt: skip
ROLES = ("coordinator", "trainer", "validator-1", "worker-1", "relay-1", "scorer")
STAY_S = (5.0, 30.0)


def say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%X')} {text}\n")


class Strangers(threading.Thread):
    """Workers that join, one after the other, and leave well or badly."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        super().__init__(daemon=True)
        self.folder, self.rng, self.left = folder, rng, Counter[str]()
        self._over = threading.Event()

    def run(self) -> None:
        address = self.folder / "coordinator.url"
        while not self._over.wait(1.0):
            if address.exists():
                self._visit(address.read_text().strip(), self.folder.parent / f"stranger-{self.left.total()}")

    def _visit(self, url: str, home: Path) -> None:
        command = [sys.executable, "-m", "farflung", "worker", url, "--folder", str(home), "--patience-s", "5"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as worker:
            self._over.wait(self.rng.uniform(*STAY_S))
            how = self.rng.choice((signal.SIGTERM, signal.SIGKILL))
            self.left[how.name] += 1
            worker.send_signal(how)

    def stop(self) -> None:
        self._over.set()
        self.join(60)


def steps_of(folder: Path) -> int:
    try:
        with sqlite3.connect(f"file:{folder / 'farflung.db'}?mode=ro", uri=True, timeout=30) as database:
            return database.execute("SELECT coalesce(max(step), 0) FROM steps WHERE weights_digest != ''").fetchone()[0]
    except sqlite3.OperationalError:  # not there yet
        return 0


def mb(*places: Path) -> float:
    """What files and folders hold; what goes while this looks counts for nothing."""
    total = 0
    for place in places:
        for file in (place, *place.rglob("*")):
            try:
                total += file.stat().st_size if file.is_file() else 0
            except OSError:
                continue
    return round(total / 1e6, 2)


def look(folder: Path, step: int) -> dict[str, float]:
    """Sizes at a moment, by what they are of."""
    found = {
        "step": step,
        "database": mb(*folder.glob("farflung.db*")),
        "blobs": mb(folder / "blobs"),
        "checkpoints": mb(folder / "checkpoints"),
        "nodes": mb(folder / "nodes"),
        "metrics": mb(folder / "metrics.jsonl"),
    }
    logs = {str((folder / "logs" / f"{role}.log").resolve()): role for role in ROLES}
    for process in psutil.process_iter():
        try:
            role = logs.get(os.readlink(f"/proc/{process.pid}/fd/2"))
            if role:
                rss = process.memory_info().rss / 1e6
                found[f"rss {role}"] = round(max(rss, found.get(f"rss {role}", 0.0)), 1)
        except (OSError, psutil.Error):
            continue
    return found


def watch(process: subprocess.Popen[bytes], folder: Path, steps: int) -> list[dict[str, float]]:
    """A look every hundredth of the way."""
    seen: list[dict[str, float]] = []
    while process.poll() is None:
        step = steps_of(folder)
        if step >= (len(seen) + 1) * steps / 100:
            seen.append(look(folder, step))
            if len(seen) % 10 == 0:
                say(json.dumps(seen[-1]))
        time.sleep(0.5)
    return seen


def main() -> int:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="60 steps")
    made.add_argument("--steps", type=int, default=1000)
    made.add_argument("--seed", type=int, default=0)
    asked = made.parse_args()
    steps = 60 if asked.quick else asked.steps
    with tempfile.TemporaryDirectory(prefix="farflung-endurance-") as scratch:
        folder = Path(scratch) / "run"
        command = [sys.executable, "-m", "farflung", "run", str(ROOT / "examples" / "demo.toml"), "--plain"]
        where = ("--run.dir", scratch, "--run.name", "run", "--run.steps", str(steps))
        began = time.monotonic()
        process = subprocess.Popen([*command, *where, *FLAGS], stdout=subprocess.DEVNULL)
        strangers = Strangers(folder, random.Random(asked.seed))
        strangers.start()
        try:
            seen = watch(process, folder, steps)
        finally:
            strangers.stop()
            process.terminate()
            process.wait(60)
        done = steps_of(folder)
        config = load(folder / "config.json", ())
        with sa.create_engine(f"sqlite:///{folder / 'farflung.db'}").connect() as connection:
            wrong = violations(connection, config)
    found = {
        "steps": done, "wall_s": round(time.monotonic() - began), "code": process.returncode,
        "strangers": dict(strangers.left), "violations": wrong, "looks": len(seen),
        "mb": {name: [one.get(name) for one in (seen[len(seen) // 10], seen[len(seen) // 2], seen[-1])]
               for name in seen[-1]},
        "most_mb": {name: max(one.get(name, 0.0) for one in seen[len(seen) // 10 :]) for name in seen[-1]},
    }  # fmt: skip
    sys.stdout.write(json.dumps(found) + "\n")
    return 1 if wrong or process.returncode or done < steps else 0


if __name__ == "__main__":
    raise SystemExit(main())
