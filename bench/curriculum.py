"""Which tasks are worth doing: tokens to the same held-out score, tasks drawn by the curriculum or all alike.

    python bench/curriculum.py [--quick] [--simulate-only] [--seeds 3] [--until 0.7] [--keep FOLDER]

First a simulation without a model: tasks whose pass rates drift as a policy learns, drawn by the very code that the
coordinator draws with. Then real runs of the demo's model in lockstep, so that tokens are a function of the seed: once
on sums of which a third are known, a third can be learned and a third are hopeless, once on sums that can all be
learned. Tokens are all that were generated for training until the held-out score is reached, between two evaluations by
a straight line. Ratios are `thompson` ÷ `uniform`. Prints one JSON object as its last line.
`--quick` simulates few seeds and runs one pair on the mixture; the full command is `python bench/curriculum.py`.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from farflung.learner.difficulty import Count, add, faded
from farflung.tasks.assign import task_order
from farflung.tasks.curriculum import Candidate, draw

ROOT = Path(__file__).parents[1]
KINDS = ("thompson", "uniform")
GROUPS, SAMPLES, OVERSAMPLE = 8, 8, 4
SHARES = {"mixture": (1, 1, 1), "alike": (0, 1, 0)}
TASKS, HELD_OUT, EVERY = 192, 256, 2


def say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%X')} {text}\n")
    sys.stderr.flush()


# --- without a model -------------------------------------------------------------------------------------------------

MOST_STEPS, LEARNS, OWN, GOAL = 400, 0.08, 0.3, 0.7
"""`LEARNS`: what a step of full variance adds to a policy's skill, in logits. `OWN`: what a group adds to its own task
alone, as a share of that."""
STALE, FORGETS = 0.9, 0.9
"""What a task that comes again teaches beyond itself: this share of the last time, and of what is missing a tenth comes
back each step."""


@dataclass
class Pupil:
    """A policy that learns from variance: it passes a task of difficulty d with the logistic of skill - d."""

    difficulty: np.ndarray
    skill: float = -1.0

    def __post_init__(self) -> None:
        self._own, self._known = np.zeros(len(self.difficulty)), np.zeros(len(self.difficulty))

    def rate(self, task: int) -> float:
        return 1 / (1 + math.exp(self.difficulty[task] - self.skill - self._own[task]))

    def learn(self, groups: Sequence[tuple[int, int]], samples: int) -> None:
        """From groups of (task, right answers); a group's gradient goes with the deviation of its rewards."""
        for task, right in groups:
            signal = 2 * math.sqrt(right / samples * (1 - right / samples)) * LEARNS
            self.skill += signal / 16 * STALE ** self._known[task]
            self._own[task] += OWN * signal
            self._known[task] += 1
        self._known *= FORGETS

    def held_out(self) -> float:
        """The mean pass rate on what can be learned at all."""
        fit = self.difficulty[np.abs(self.difficulty) < 5]
        return float(np.mean(1 / (1 + np.exp(fit - self.skill))))


def difficulties(kind: str, tasks: int, rng: np.random.Generator) -> np.ndarray:
    """Of a third each, of four fifths hopeless, of many grades, or of one kind."""
    noise = rng.normal(0, 1, tasks)
    if kind == "mixture":
        return rng.choice([-6.0, 0.0, 12.0], tasks) + noise
    if kind == "mostly hopeless":
        return rng.choice([0.0, 12.0], tasks, p=[0.2, 0.8]) + noise
    return 1.5 + 3 * noise if kind == "many grades" else 0.5 * noise


def simulate(kind: str, how: str, tasks: int, seed: int, groups: int = 16, samples: int = 16) -> int:
    """Groups generated until the held-out pass rate is there."""
    rng = np.random.default_rng(seed)
    pupil, counts, seen = Pupil(difficulties(kind, tasks, rng)), [Count()] * tasks, [-1] * tasks
    spent = 0
    for step in range(MOST_STEPS):
        secret = hashlib.sha256(f"{seed}/{step}".encode()).digest()
        order = list(itertools.islice(task_order(secret, step, tasks), groups * OVERSAMPLE))
        if how == "thompson":
            fresh = [Candidate(task, counts[task], seen[task]) for task in order]
            known = [Candidate(task, counts[task], seen[task]) for task in range(tasks) if seen[task] >= 0]
            order = [one.position for one in draw(secret, step, len(order), known, fresh)]
        found: list[tuple[int, int]] = []
        for task in order:
            found.append((task, int(rng.binomial(samples, pupil.rate(task)))))
            if sum(0 < right < samples for _, right in found) == groups:
                break
        spent += len(found)
        for task, right in found:
            before = faded(counts[task], step + 1 - seen[task]) if seen[task] >= 0 else counts[task]
            counts[task], seen[task] = add(before, samples, right, 0), step + 1  # the step that takes the group
        pupil.learn(found, samples)
        if pupil.held_out() >= GOAL:
            break
    return spent


def simulated(seeds: int) -> dict[str, Any]:
    """Median ratio of generated groups and its range over seeds, for each kind of task set and two sizes."""
    found: dict[str, Any] = {}
    for kind, tasks in itertools.product(("mixture", "mostly hopeless", "many grades", "alike"), (512, 4096)):
        ratios = [simulate(kind, "thompson", tasks, s) / simulate(kind, "uniform", tasks, s) for s in range(seeds)]
        found[f"{kind}, {tasks} tasks"] = summary(ratios)
        say(f"simulated {kind}, {tasks} tasks: {summary(ratios)}")
    return found


def summary(ratios: Sequence[float]) -> dict[str, Any]:
    """Median, lowest and highest."""
    return {
        "median": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "seeds": len(ratios),
    }


def timed(tasks: int = 100_000) -> float:
    """Milliseconds of the draw for one step, from as many known tasks as it ever looks at."""
    order = list(itertools.islice(task_order(bytes(32), 1, tasks), 128))
    known = [Candidate(task, Count(16, task % 17, 160), 1) for task in range(2048)]
    fresh = [Candidate(task, Count(), -1) for task in order]
    began = time.perf_counter()
    for step in range(10):
        draw(bytes(32), step + 1, 128, known, fresh)
    return round((time.perf_counter() - began) * 100, 2)


# --- with a model ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A run's held-out scores: after which step, tokens and seconds."""

    scores: list[tuple[int, int, float, float]]
    informative: float
    """Share of the groups it looked at that had variance."""

    def reached(self, level: float, column: int) -> float | None:
        """Tokens (1) or seconds (2) at which the score is first there, by a straight line between two evaluations."""
        for before, after in itertools.pairwise(self.scores):
            if after[3] >= level:
                share = (level - before[3]) / (after[3] - before[3]) if after[3] > before[3] else 1.0
                return before[column] + max(0.0, share) * (after[column] - before[column])
        return None


def run(folder: Path, tasks: str, how: str, seed: int, asked: argparse.Namespace) -> Curve:
    """One run, stopped once the held-out score is there."""
    config = {
        "run": {"name": "learn", "dir": str(folder), "steps": asked.steps, "seed": seed, "reproducible": True},
        "model": {"path": str(ROOT / "examples" / "base")},
        "env": {"name": f"{ROOT / 'bench' / 'load' / 'mixed_sums.py'}:MixedSums", "args": {"shares": SHARES[tasks]}},
        "generate": {"samples": SAMPLES, "max_new_tokens": 32},
        "learn": {"groups": GROUPS, "oversample": OVERSAMPLE, "lockstep": True, "max_staleness": 0, "lr": asked.lr},
        "eval": {"tasks": HELD_OUT, "every": EVERY, "samples": 0},
        "lease": {"rollouts": GROUPS * SAMPLES, "lease_s": 600.0, "heartbeat_s": 2.0, "lost_s": 120.0},
        "worker": {"slots": GROUPS * SAMPLES},
        "swarm": {"workers": 1, "validators": 1},
    }
    config["env"] |= {"train_tasks": TASKS, "eval_tasks": HELD_OUT}
    config["learn"] |= {"curriculum": how, "max_grad_norm": 1.0, "checkpoint_every": 1000}
    path = folder / "learn.json"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "farflung", "run", str(path), "--fresh", "--plain"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        while process.poll() is None and (curve_of(folder).reached(asked.until, 1)) is None:
            time.sleep(1.0)
    finally:
        process.terminate()
        process.wait(300)
    curve = curve_of(folder)
    say(f"{tasks} {how} seed {seed}: {[(s, t, round(score, 3)) for s, t, _, score in curve.scores]}")
    return curve


def curve_of(folder: Path) -> Curve:
    """The curve as far as a run has come."""
    path = folder / "learn" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    at = {row["step"]: row["at"] for row in rows if row["kind"] == "step"}
    evals = sorted((row["step"], row["score"]) for row in rows if row["kind"] == "eval")
    if 0 not in at or not evals:
        return Curve([], 0.0)
    with sqlite3.connect(f"file:{folder / 'learn' / 'farflung.db'}?mode=ro", uri=True, timeout=60) as database:
        tokens = dict(database.execute(_TOKENS).fetchall())
        (share,) = database.execute(_INFORMATIVE).fetchone()
    spent = {step: sum(tokens.get(policy, 0) for policy in range(step)) for step, _ in evals}
    return Curve([(step, spent[step], at[step] - at[0], score) for step, score in evals], share or 0.0)


_TOKENS = """SELECT g.step, sum(r.tokens) FROM rollouts r JOIN "groups" g ON g."group" = r."group"
             WHERE g.purpose = 'train' GROUP BY g.step"""
_INFORMATIVE = """SELECT avg(is_informative) FROM "groups" WHERE purpose = 'train' AND batch_step IS NOT NULL"""


def compared(tasks: str, seeds: Sequence[int], asked: argparse.Namespace) -> dict[str, Any]:
    """Both ways with the same seeds."""
    curves: dict[str, list[Curve]] = {how: [] for how in KINDS}
    for seed, how in itertools.product(seeds, KINDS):
        with tempfile.TemporaryDirectory(prefix="farflung-curriculum-") as scratch:
            folder = asked.keep.resolve() / f"{tasks}-{how}-{seed}" if asked.keep else Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            curves[how].append(run(folder, tasks, how, seed, asked))
    found: dict[str, Any] = {}
    for name, column in (("token_ratio", 1), ("wall_ratio", 2)):
        pairs = [tuple(c.reached(asked.until, column) for c in both) for both in zip(*curves.values(), strict=True)]
        ratios = [ours / other for ours, other in pairs if ours and other]
        found[name] = summary(ratios) if ratios else None
    for how in KINDS:
        found[f"{how}_tokens"] = [c.reached(asked.until, 1) for c in curves[how]]
        found[f"{how}_informative"] = [round(c.informative, 3) for c in curves[how]]
    return found


def main() -> int:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="few seeds of the simulation, one pair of runs")
    made.add_argument("--simulate-only", action="store_true")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--until", type=float, default=0.7, help="held-out score to reach")
    made.add_argument("--steps", type=int, default=60, help="most steps of a run")
    made.add_argument("--lr", type=float, default=4e-5)
    made.add_argument("--sets", nargs="+", choices=SHARES, default=list(SHARES))
    made.add_argument("--keep", type=Path, help="a folder for the records of all runs")
    asked = made.parse_args()
    seeds, sets = (range(1, 2), ["mixture"]) if asked.quick else (range(1, asked.seeds + 1), asked.sets)
    found: dict[str, Any] = {"draw_ms": timed(), "simulated": simulated(2 if asked.quick else 12)}
    if not asked.simulate_only:
        found |= {tasks: compared(tasks, seeds, asked) for tasks in sets}
    sys.stdout.write(json.dumps(found | {"until": asked.until, "load_average": os.getloadavg()[0]}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
