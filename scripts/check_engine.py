"""Check a vLLM server as a worker's engine: about ten minutes on a GPU, then a table to send back.

    farflung engine install vllm && python scripts/check_engine.py MODEL             # a server of its own
    python scripts/check_engine.py MODEL --url http://127.0.0.1:8000                  # one that runs

MODEL is a folder of a Hugging Face causal LM, one that the server was started with. It is checked whether the server
samples as the run asks, how its tokens agree with a replay by torch on the same machine, what cheats look like beside
it, whether a swap of weights comes through, how fast it is, and a run of all roles with it. A section that fails is a
row; the others go on. The table goes to stdout and after it one line of JSON; progress goes to stderr. Ends with 1 if
something does not hold. `--tokens` makes it shorter. The server holds other weights afterwards.
"""

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import numpy as np
import torch

from farflung.engine.arithmetic import Own
from farflung.engine.base import Completion, Request
from farflung.engine.fit import Text, cache_bytes
from farflung.engine.local import LocalEngine
from farflung.engine.vllm import VllmEngine
from farflung.engine.vllm_answers import TIMEOUT_S, server_numerics
from farflung.engine.vllm_process import HOME, ServerSize, serving
from farflung.numerics.devices import pick
from farflung.ops.calibrate import published
from farflung.tasks.model import Model

ROOT = Path(__file__).parents[1]
BEGAN = time.monotonic()
NEW, ROWS, NEAR_TIE = 64, 64, 1e-5
Weights = dict[str, torch.Tensor]


class Row(NamedTuple):
    """A line of the table."""

    section: str
    what: str
    found: str
    figure: float | None = None
    holds: bool | None = None
    """Whether it is as it must be; None where nothing must."""


@dataclass
class Setup:
    """What all sections share."""

    model: Model
    engine: VllmEngine
    url: str
    device: torch.device
    tokens: int
    weights: Weights
    own: Own

    def asked(self, count: int, seed: int = 0) -> list[Request]:
        """Requests with prompts of several lengths."""
        rng = np.random.default_rng(seed)
        prompts = [tuple(rng.integers(3, self.model.vocab, 8 + 4 * (i % 7)).tolist()) for i in range(count)]
        return [Request(prompt, int(rng.integers(2**53)), 1.0, NEW) for prompt in prompts]


def say(text: str) -> None:
    """A line of progress."""
    sys.stderr.write(f"{time.monotonic() - BEGAN:6.1f} s  {text}\n")
    sys.stderr.flush()


# --- sections --------------------------------------------------------------------------------------------------------


def sampling(setup: Setup) -> Iterator[Row]:
    """Whether it samples as the run asks, at two loads."""
    for what in ("first load", "second load"):
        since = time.monotonic()
        setup.engine.load(setup.weights.items())
        took = time.monotonic() - since
        yield Row("sampling", f"{what}, tried", f"as the run asks, {took:.1f} s", took, holds=True)


def agreement(setup: Setup) -> Iterator[Row]:
    """How many of its tokens a replay by torch would not have sent, and the same of two cheats."""
    asked = setup.asked(max(8, setup.tokens // NEW))
    kinds = {
        "honest": asked,
        "unseeded": [replace(one, seed=one.seed ^ 1) for one in asked],
        "temperature 0.9": [replace(one, temperature=0.9) for one in asked],
    }
    texts = {kind: done(setup.engine.generate(some)) for kind, some in kinds.items()}
    for dtype in (torch.float32, torch.bfloat16):
        judge = verifier(setup, dtype, setup.weights)
        share: dict[str, float] = {}
        for kind, said in texts.items():
            margin, tokens = margins(judge, asked, said)
            share[kind] = float((margin > NEAR_TIE).mean())
            text = f"{share[kind]:.2%} of {tokens:,} tokens another, by {margin.max():.3f} at most"
            holds = kind == "honest" or share[kind] > 1.5 * share["honest"] or kind != "unseeded"
            yield Row("agreement", f"{kind}, replayed in {dtype}", text, share[kind], holds=holds)


def swap(setup: Setup) -> Iterator[Row]:
    """Whether new weights come through, and no old ones after."""
    made = torch.Generator().manual_seed(1)
    other = {
        name: (value.float() * (1 + 0.05 * torch.randn(value.shape, generator=made))).to(value.dtype)
        for name, value in setup.weights.items()
    }
    since = time.monotonic()
    setup.engine.load(other.items())
    took = time.monotonic() - since
    asked = setup.asked(16, seed=2)
    said = done(setup.engine.generate(asked))
    new, old = (float((margins(verifier(setup, torch.float32, some), asked, said)[0] > NEAR_TIE).mean())
                for some in (other, setup.weights))  # fmt: skip
    text = f"{new:.2%} another by the new weights, {old:.2%} by the old ones, {took:.1f} s"
    yield Row("swap", "weights 5 % off", text, took, holds=new < old / 2)
    setup.engine.load(setup.weights.items())


def speed(setup: Setup) -> Iterator[Row]:
    """Tokens a second through the engine, and by the same requests with nothing of ours in between."""
    asked = setup.asked(4 * ROWS, seed=3)
    bodies = [setup.engine._body(one) for one in asked]
    found: dict[str, list[float]] = {"bare": [], "farflung": []}
    for _ in range(3):
        since = time.monotonic()
        tokens = sum(len(one["choices"][0]["token_ids"]) for one in asyncio.run(bare(setup, bodies)))
        found["bare"].append(tokens / (time.monotonic() - since))
        since = time.monotonic()
        tokens = sum(len(one.ids) for one in done(setup.engine.generate(asked)))
        found["farflung"].append(tokens / (time.monotonic() - since))
    ours, theirs = (float(np.median(found[kind])) for kind in ("farflung", "bare"))
    text = f"{ours:,.0f} tokens/s under farflung, {theirs:,.0f} without, ratio {ours / theirs:.3f}"
    yield Row("speed", f"{len(asked)} requests of {NEW} tokens", text, ours / theirs, holds=ours / theirs > 0.9)


def whole_run(setup: Setup) -> Iterator[Row]:
    """A profile for this server, and a run of three steps with a worker on it beside a worker of torch."""
    with tempfile.TemporaryDirectory(prefix="farflung-check-") as scratch:
        profile, path = Path(scratch) / "vllm.json", Path(scratch) / "check.json"
        farflung("calibrate", setup.model.path, "--engine-url", setup.url, "--tokens", str(4 * setup.tokens),
                 "--device", str(setup.device), "--out", str(profile))  # fmt: skip
        path.write_text(json.dumps(run_file(setup, Path(scratch), profile)))
        since = time.monotonic()
        farflung("run", str(path), "--plain")
        took = time.monotonic() - since
        summary = json.loads((Path(scratch) / "check" / "summary.json").read_text())
    names = "steps", "rollouts_accepted", "rollouts_rejected", "honest_ejected"
    steps, accepted, rejected, ejected = (summary[name] for name in names)
    text = f"{steps} of 3 steps in {took:.0f} s, {accepted} rollouts accepted, {rejected} rejected, {ejected} ejected"
    yield Row("run", "farflung run with a worker on it", text, took, holds=(steps, rejected, ejected) == (3, 0, 0))


SECTIONS: dict[str, Callable[[Setup], Iterator[Row]]] = {
    "sampling": sampling,
    "agreement": agreement,
    "swap": swap,
    "speed": speed,
    "run": whole_run,
}


# --- parts -----------------------------------------------------------------------------------------------------------


def done(found: Sequence[Completion | None]) -> list[Completion]:
    """Completions, none of which failed."""
    if None in found:
        raise RuntimeError(f"{sum(one is None for one in found)} of {len(found)} requests failed")
    return [one for one in found if one is not None]


def verifier(setup: Setup, dtype: torch.dtype, weights: Weights) -> LocalEngine:
    """An engine of torch with these weights."""
    engine = LocalEngine.from_folder(setup.model.path, dtype=dtype, device=setup.device, eos_ids=setup.model.eos_ids)
    engine.load(weights.items())
    return engine


def margins(judge: LocalEngine, asked: Sequence[Request], said: Sequence[Completion]) -> tuple[np.ndarray, int]:
    """By how much each token lost, and how many there are."""
    replays = judge.replay([(request, one.ids) for request, one in zip(asked, said, strict=True)])
    found = np.concatenate([one.margin for one in replays])
    return found, len(found)


async def bare(setup: Setup, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers to these requests, as many at once as the engine has under way."""
    limits = httpx2.Limits(max_connections=setup.engine.max_rows)
    async with httpx2.AsyncClient(base_url=setup.url, limits=limits, timeout=TIMEOUT_S, trust_env=False) as client:
        answers = await asyncio.gather(*(client.post("/inference/v1/generate", json=body) for body in bodies))
    return [answer.json() for answer in answers]


def run_file(setup: Setup, folder: Path, profile: Path) -> dict[str, Any]:
    """The settings of the run."""
    own = "torch-cpu-fp32"
    return {
        "run": {"name": "check", "dir": str(folder), "steps": 3, "reproducible": True},
        "model": {"path": str(Path(setup.model.path).resolve()), "profile": own, "profiles": [str(profile)]},
        "env": {"name": "sums", "train_tasks": 256, "eval_tasks": 8},
        "generate": {"samples": 8, "max_new_tokens": 32},
        "learn": {"groups": 4, "lr": 1e-6, "device": str(setup.device)},
        "validator": {"device": str(setup.device)},
        "worker": {"engine": "vllm", "engine_url": setup.url, "slots": ROWS},
        "eval": {"tasks": 0},
        "lease": {"lease_s": 600.0, "lost_s": 60.0},
        "swarm": {"workers": 1},
    }


def farflung(*arguments: str) -> None:
    """A command of ours; raises RuntimeError with its last words."""
    finished = subprocess.run(
        [sys.executable, "-m", "farflung", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    sys.stderr.write(finished.stdout[-4000:])
    if finished.returncode:
        raise RuntimeError(
            f"farflung {arguments[0]} ended with {finished.returncode}: {finished.stdout[-300:].strip()}"
        )


def measured(name: str, setup: Setup) -> Iterator[Row]:
    """The rows of a section; one that fails says so in its last row."""
    try:
        yield from SECTIONS[name](setup)
    except Exception as error:  # noqa: BLE001 - the other sections are to be measured too
        lines = str(error).strip().splitlines()
        yield Row(name, "the rest", f"failed: {type(error).__name__}: {lines[0][:200] if lines else ''}", holds=False)


def facts_of(setup: Setup) -> dict[str, str]:
    """What is checked, and on what."""
    version = httpx2.get(f"{setup.url}/version", timeout=TIMEOUT_S).json().get("version", "unknown")
    noise = "our processor" if setup.engine._has_processor else "its own"
    return {"vllm": version, "server": setup.own.text, "noise": noise, "replay": str(setup.device)}


def table(facts: dict[str, str], rows: Sequence[Row]) -> str:
    """What to send back."""
    lines = [", ".join(f"{name}: {value}" for name, value in facts.items()), "", "| section | what | found | holds |"]
    lines += ["| --- | --- | --- | --- |"]
    marks = {True: "yes", False: "**NO**", None: ""}
    return "\n".join(lines + [f"| {one.section} | {one.what} | {one.found} | {marks[one.holds]} |" for one in rows])


def main() -> int:
    """Measure, print, and say whether all held that must."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model")
    made.add_argument("--url", default="", help="a server that runs; without it one is started")
    made.add_argument("--home", type=Path, default=HOME, help="where `farflung engine install` put it")
    made.add_argument("--device", default="auto", help="what replays: auto, cpu, cuda:N")
    made.add_argument("--tokens", type=int, default=8000, help="of each text that is compared")
    made.add_argument("--only", nargs="+", choices=tuple(SECTIONS))
    asked = made.parse_args()
    device, model = pick(asked.device), Model(asked.model)
    config = Path(model.path, "config.json").read_bytes()
    text = Text(64, NEW)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="farflung-engine-")))
        size = ServerSize(device, text.tokens, ROWS, cache_bytes(config, torch.bfloat16, text, ROWS), 0.0, 2)
        say("starting vLLM" if not asked.url else f"asking {asked.url}")
        url = asked.url or stack.enter_context(serving(asked.home, folder, config, size))
        engine = VllmEngine(url, folder, eos_ids=model.eos_ids, vocab=model.vocab, max_rows=ROWS)
        setup = Setup(model, engine, url, device, asked.tokens, dict(published(model.path)), server_numerics(url))
        facts, rows = facts_of(setup), list[Row]()
        for name in asked.only or SECTIONS:
            say(f"{name}: {SECTIONS[name].__doc__}")
            for row in measured(name, setup):
                say(f"{name}: {row.what}: {row.found}")
                rows.append(row)
    sys.stdout.write(f"{table(facts, rows)}\n{json.dumps({**facts, 'rows': [row._asdict() for row in rows]})}\n")
    return int(any(row.holds is False for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
