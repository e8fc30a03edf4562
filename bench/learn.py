"""A real language model learns sums: farflung against TRL on the same machine, with the same model and tasks.

    python bench/learn.py [--quick] [--seeds 3] [--until 0.5 0.7] [--keep FOLDER] [--peer-python PYTHON | --no-peer]

SmolLM2 on single-digit sums as a chat: 8 prompts × 8 samples a step, at most 24 new tokens, temperature 1, lr 1e-5,
AdamW (0.9, 0.999). farflung runs a trainer, a validator and a worker with verification on, each step on the groups of
the policy before it (`learn.lockstep`) in `--minibatches` optimizer updates; TRL's GRPOTrainer runs in an environment
that this script makes in a cache folder, in float32 where the machine does not compute in bfloat16 or where
`--peer-precision` says so. Each is stopped once the mean reward of five steps reaches the last of `--until`. Clocks
start when training does: models are loaded, nothing is generated yet.
Prints one JSON object as its last line: ratios are ours ÷ the peer's, medians over seeds; null if never reached.
`--quick` compares one seed up to the first of `--until`; the full command is `python bench/learn.py`.
"""

import argparse
import contextlib
import json
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from farflung.envs.reasoning_gym import ReasoningGym
from farflung.numerics.train_precision import Precision, compute_dtype

ROOT = Path(__file__).parents[1]
SMOL = ROOT / "models" / "smollm2-135m"
TASK = {"config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}, "suffix": ""}
GROUPS, SAMPLES, BUDGET, LR, BETAS = 8, 8, 24, 1e-5, (0.9, 0.999)
WINDOW = 5
EVERY_S = 15.0
"""Between looks at memory; a look at 4 GB of pages takes a good part of a second from what is measured."""
PEER = ("trl==1.16.0", "reasoning-gym", "datasets")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "farflung-bench"


@dataclass(frozen=True)
class Curve:
    """What one run came to, step by step."""

    at_s: list[float]
    rewards: list[float]
    tokens: list[int]
    cpu_s: float
    peak_mb: float

    def reached(self, level: float) -> int | None:
        """The first step, counted from 0, at which the mean of five is there."""
        means = (sum(self.rewards[k - WINDOW + 1 : k + 1]) / WINDOW for k in range(WINDOW - 1, len(self.rewards)))
        return next((k for k, mean in enumerate(means, WINDOW - 1) if mean >= level), None)

    def wall_s(self, level: float) -> float | None:
        step = self.reached(level)
        return None if step is None else self.at_s[step]

    def spent(self, level: float) -> int | None:
        step = self.reached(level)
        return None if step is None else sum(self.tokens[: step + 1])

    def step_s(self) -> float:
        return self.at_s[-1] / len(self.at_s) if self.at_s else float("nan")


def say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%X')} {text}\n")
    sys.stderr.flush()


class Watch(threading.Thread):
    """Samples the memory of a process and its children (proportional, so shared pages count once) and their CPU."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process, self._over = psutil.Process(pid), threading.Event()
        self.peak_mb, self._cpu = 0.0, dict[int, float]()

    def run(self) -> None:
        while not self._over.wait(EVERY_S):
            total = 0
            for one in self._family():
                try:
                    total += one.memory_full_info().pss
                    times = one.cpu_times()
                    self._cpu[one.pid] = times.user + times.system
                except psutil.Error:  # it ended meanwhile
                    continue
            self.peak_mb = max(self.peak_mb, total / 1e6)

    def stop(self) -> tuple[float, float]:
        """CPU-seconds of all, and the peak of their memory in MB."""
        self._over.set()
        self.join()
        return sum(self._cpu.values()), self.peak_mb

    def _family(self) -> list[psutil.Process]:
        try:
            return [self._process, *self._process.children(recursive=True)]
        except psutil.Error:
            return []


# --- farflung --------------------------------------------------------------------------------------------------------


def ours(folder: Path, seed: int, most_steps: int, until: float, threads: int, minibatches: int) -> Curve:
    """A run of farflung, stopped once it is there."""
    dtype, why = compute_dtype("auto")
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    say(f"farflung, seed {seed}, {name}: {why}")
    config = {
        "run": {"name": "learn", "dir": str(folder), "steps": most_steps, "seed": seed, "reproducible": True},
        "model": {"path": str(SMOL), "profile": f"torch-cpu-{name}"},
        "env": {"name": "reasoning_gym:chain_sum", "args": TASK, "train_tasks": 1000, "eval_tasks": 1},
        "generate": {"samples": SAMPLES, "max_new_tokens": BUDGET},
        "learn": {
            "groups": GROUPS,
            "oversample": 1.0,
            "curriculum": "uniform",  # as the peer does
            "lockstep": True,
            "max_staleness": 0,
            "lr": LR,
            "beta1": BETAS[0],
            "beta2": BETAS[1],
            "minibatches": minibatches,
            "microbatch_tokens": 1600 // minibatches,
            "checkpoint_every": 1000,  # the peer saves nothing either
            "threads": threads,
        },
        "eval": {"tasks": 0},
        "lease": {"rollouts": GROUPS * SAMPLES, "lease_s": 1800.0, "heartbeat_s": 2.0, "lost_s": 120.0},
        "worker": {"slots": GROUPS * SAMPLES, "threads": threads},
        "validator": {"threads": threads},
        "swarm": {"workers": 1, "validators": 1},
    }
    path = folder / "learn.json"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "farflung", "run", str(path), "--fresh", "--plain"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    watch = Watch(process.pid)
    watch.start()
    try:
        steps = _follow(process, folder / "learn" / "metrics.jsonl", until)
    finally:
        cpu_s, peak_mb = watch.stop()
        process.send_signal(signal.SIGINT)
        process.wait(120)
    if not steps:
        raise SystemExit(f"farflung came to no step; see {folder}/learn/logs")
    began, rest = steps[0]["at"], steps[1:]
    tokens = _generated(folder / "learn" / "farflung.db", [step["step"] for step in rest])
    return Curve([step["at"] - began for step in rest], [step["reward"] for step in rest], tokens, cpu_s, peak_mb)


def _follow(process: subprocess.Popen[bytes], path: Path, until: float) -> list[dict[str, Any]]:
    """The steps of a run as they are committed, until they are good enough or the run ends."""
    steps: list[dict[str, Any]] = []
    while process.poll() is None:
        lines = path.read_text().splitlines() if path.exists() else []
        found = [row for line in lines if line.endswith("}") and (row := json.loads(line))["kind"] == "step"]
        for step in found[len(steps) :]:
            say(f"farflung step {step['step']} reward {step.get('reward', 0):.3f}")
        steps = found
        last = [step["reward"] for step in steps[1:]][-WINDOW:]
        if len(last) == WINDOW and sum(last) / WINDOW >= until:
            break
        time.sleep(0.5)
    return steps


def _generated(database: Path, steps: Sequence[int]) -> list[int]:
    """Tokens generated for each step: those of all rollouts leased at the policy before it, used or not."""
    query = """SELECT coalesce(sum(r.tokens), 0) FROM rollouts r JOIN "groups" g ON g."group" = r."group"
               WHERE g.purpose = 'train' AND g.step = ?"""
    with sqlite3.connect(database) as connection:
        return [connection.execute(query, (step - 1,)).fetchone()[0] for step in steps]


# --- the peer --------------------------------------------------------------------------------------------------------


def environment() -> Path:
    """The Python of an environment that holds the peer, made once."""
    folder = CACHE / "trl-1.16.0"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        say(f"making the peer's environment in {folder}")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pins = ["-c", str(ROOT / "constraints.txt")]
        subprocess.run([str(python), "-m", "pip", "install", "-q", "torch==2.13.0", *PEER, *pins], check=True)
        (folder / "ready").touch()
    return python


def peer(
    python: Path, folder: Path, seed: int, most_steps: int, until: float, threads: int, precision: Precision
) -> Curve:
    """A run of TRL, which stops by itself once it is there."""
    env = ReasoningGym("chain_sum", **TASK)
    tasks = [{"prompt": env.prompt(task), "answer": task["answer"]} for task in env.tasks("train")]
    is_bf16 = compute_dtype(precision)[0] == torch.bfloat16
    spec = {
        "model": str(SMOL.resolve()),
        "tasks": tasks,
        "groups": GROUPS,
        "samples": SAMPLES,
        "max_new_tokens": BUDGET,
    }
    spec |= {"lr": LR, "betas": BETAS, "seed": seed, "threads": threads, "is_bf16": is_bf16}
    spec |= {"most_steps": most_steps, "until": until, "folder": str(folder / "trl")}
    (folder / "spec.json").write_text(json.dumps(spec))
    path = folder / "steps.jsonl"
    command = [str(python), str(ROOT / "bench" / "learn_peer.py"), str(folder / "spec.json"), str(path)]
    environ = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    say(f"TRL, seed {seed}, {'bf16' if is_bf16 else 'fp32'}")
    with (folder / "peer.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environ)
        watch = Watch(process.pid)
        watch.start()
        try:
            process.wait()
        finally:
            process.kill()  # nothing by then, unless this was interrupted
            cpu_s, peak_mb = watch.stop()
    if not path.exists():
        raise SystemExit(f"the peer came to no step: {(folder / 'peer.log').read_text()[-1500:]}")
    return curve_of(path, cpu_s, peak_mb)


def curve_of(path: Path, cpu_s: float, peak_mb: float) -> Curve:
    """A curve from the lines that the peer wrote."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return Curve(*([row[name] for row in rows] for name in ("at_s", "reward", "tokens")), cpu_s, peak_mb)


# --- both ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def place(keep: Path | None, seed: int) -> Iterator[Path]:
    """A folder for the runs of a seed."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="farflung-learn-") as scratch:
            yield Path(scratch)
        return
    folder = keep.resolve() / f"seed-{seed}"
    if folder.exists():
        raise SystemExit(f"{folder} is there already; name another folder with --keep")
    folder.mkdir(parents=True)
    yield folder


def report(our: Sequence[Curve], theirs: Sequence[Curve], levels: Sequence[float]) -> dict[str, Any]:
    """The figures of all seeds."""
    found: dict[str, Any] = {
        "step_s": _median([curve.step_s() for curve in our]),
        "peer_step_s": _median([curve.step_s() for curve in theirs]),
        "wall_ratio_to_reward": _ratio(our, theirs, levels[0], "wall_s"),
        "token_ratio_to_reward": _ratio(our, theirs, levels[0], "spent"),
        "peak_mb": _median([curve.peak_mb for curve in our]),
        "peer_peak_mb": _median([curve.peak_mb for curve in theirs]),
        "cpu_s_per_step": _median([curve.cpu_s / max(1, len(curve.rewards)) for curve in our]),
        "peer_cpu_s_per_step": _median([curve.cpu_s / max(1, len(curve.rewards)) for curve in theirs]),
        "rewards": [curve.rewards for curve in our],
        "peer_rewards": [curve.rewards for curve in theirs],
        "load_average": os.getloadavg()[0],
    }
    for level in levels:
        found[f"to_{level}"] = {
            "steps": [curve.reached(level) for curve in our],
            "peer_steps": [curve.reached(level) for curve in theirs],
            "wall_ratio": _ratio(our, theirs, level, "wall_s"),
            "token_ratio": _ratio(our, theirs, level, "spent"),
        }
    return found


def _median(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 3) if values else None


def _ratio(our: Sequence[Curve], theirs: Sequence[Curve], level: float, name: str) -> float | None:
    pairs = [(getattr(one, name)(level), getattr(other, name)(level)) for one, other in zip(our, theirs, strict=False)]
    whole = [one / other for one, other in pairs if one is not None and other]
    return _median(whole) if whole else None


def picture(our: Sequence[Curve], theirs: Sequence[Curve], path: Path) -> None:
    """Both curves, mean of five steps over minutes, as an SVG."""
    shown = [(curve, "#0b7285") for curve in our] + [(curve, "#c92a2a") for curve in theirs]
    longest = max(curve.at_s[-1] for curve, _ in shown)
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 360" font-family="sans-serif" font-size="12">']
    parts.append('<rect width="640" height="360" fill="white"/>')
    for level in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = 320 - 280 * level
        parts.append(f'<path d="M50 {y}H620" stroke="#ddd"/><text x="20" y="{y + 4}">{level:g}</text>')
    for curve, colour in shown:
        means = [statistics.fmean(curve.rewards[max(0, k - WINDOW + 1) : k + 1]) for k in range(len(curve.rewards))]
        points = [f"{50 + 570 * t / longest:.1f},{320 - 280 * m:.1f}" for t, m in zip(curve.at_s, means, strict=True)]
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>')
    parts.append(f'<text x="300" y="350">minutes, up to {longest / 60:.0f}</text>')
    parts.append(
        '<text x="60" y="30" fill="#0b7285">farflung</text><text x="130" y="30" fill="#c92a2a">TRL 1.16</text>'
    )
    path.write_text("\n".join([*parts, "</svg>\n"]))


def main() -> int:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="one seed, up to the first level only")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--until", type=float, nargs="+", default=[0.5, 0.7])
    made.add_argument("--steps", type=int, default=60, help="most steps of each")
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch threads of trainer, worker, peer")
    made.add_argument(
        "--minibatches", type=int, default=4, help="optimizer updates per step of farflung; TRL takes one, its default"
    )
    made.add_argument("--peer-python", type=Path, help="an environment with TRL; made if not given")
    made.add_argument(
        "--peer-precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="arithmetic of TRL, over float32 weights; auto: bfloat16 where the machine computes in it",
    )
    made.add_argument("--peer-steps", type=Path, nargs="*", help="lines of earlier runs of the peer, one file a seed")
    made.add_argument("--no-peer", action="store_true")
    made.add_argument(
        "--keep", type=Path, help="a folder for the records of all runs, which are thrown away without it"
    )
    made.add_argument("--picture", type=Path, help="where the curves go, as an SVG")
    asked = made.parse_args()
    if not SMOL.exists():
        raise SystemExit("models/smollm2-135m is missing; make it with python scripts/get_smollm2.py")
    levels, seeds = (asked.until[:1], 1) if asked.quick else (asked.until, asked.seeds)
    our: list[Curve] = []
    theirs = [curve_of(path, 0.0, 0.0) for path in asked.peer_steps or ()]
    is_asked = not asked.no_peer and not theirs
    python = (asked.peer_python or environment()) if is_asked else Path()
    for seed in range(1, seeds + 1):
        with place(asked.keep, seed) as folder:
            our.append(ours(folder, seed, asked.steps, levels[-1], asked.threads, asked.minibatches))
            if is_asked:
                settings = asked.steps, levels[-1], asked.threads, asked.peer_precision
                theirs.append(peer(python, folder, seed, *settings))
    if asked.picture:
        picture(our, theirs, asked.picture)
    sys.stdout.write(json.dumps(report(our, theirs, levels)) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
