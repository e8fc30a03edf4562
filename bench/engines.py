"""Engines side by side: how fast each generates, and whether vLLM's text passes for what the seeds say.

`--beside` measures each engine beside its own benchmark instead: vLLM's `bench throughput` and the same number of
requests of the same lengths through farflung to a server that it manages (`--home`); and for vLLM and torch a worker
under a coordinator beside the same requests to its engine alone. Rounds alternate; medians and ratios are printed.

Prints one JSON object as its last line. Without a vLLM server (`--vllm-url`, started as docs/run.md says, on
models/smollm2-135m) its part is skipped. `--vllm-pid` is the server's process, for CPU-seconds. Rollouts go to the file
of `--rollouts` as they come and are taken from it first, so that a slow machine need not make them again. Every rollout
is replayed in float32, and one in four in bfloat16 too. `--profile` writes the profile that all of them give.
`--quick` takes a twentieth of the rollouts, or one short round; the full command is
`python bench/engines.py --vllm-url URL`, and then with `--beside` alone.
"""

import argparse
import json
import math
import random
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import psutil
import torch
from load.beside import Lengths, Pace, paces, vllm_throughput
from transformers import AutoModelForCausalLM
from verification import SETTINGS, SIZE, SMOL, Kind, Tensors, engine, findings, say, tensors, until_caught

from farflung.config import WorkerSection
from farflung.config.tree import WAVES
from farflung.engine.base import Completion, Request
from farflung.engine.fit import Text, cache_bytes
from farflung.engine.local import LocalEngine
from farflung.engine.vllm import VllmEngine
from farflung.engine.vllm_process import HOME, READY, ServerSize, serving
from farflung.protocol.errors import Unreachable
from farflung.protocol.numerics import Numerics
from farflung.protocol.seeds import SEED_BITS
from farflung.tasks.create_run import Model
from farflung.trust import bounds, evidence
from farflung.trust.evidence import Profile, Seen

NAME = "vllm-cpu-bf16"
BF16 = Numerics(engine="vllm", device="cpu", arithmetic="bfloat16", bits=16)
ABOUT: dict[str, Any] = {"numerics": BF16, "verified_in": ["bfloat16", "float32"]}
BUDGET, ROWS = 32, 64
QUICK_BUDGET = 8
"""New tokens per rollout where only speed is measured."""
KINDS = {"honest": 1.0, "temperature 0.9": 0.9, "temperature 1.1": 1.1}
"""What was sent, and by what factor its temperature differs from the one that was asked for."""
BATCHES = ((64, 1.0), (7, 0.25), (1, 0.0625))
"""Requests under way at once, and how many of the tokens are made so."""
TOLERANCE = 2e-3
THINGS = (
    "gravity",
    "a cell",
    "rain",
    "love",
    "Paris",
    "jazz",
    "salt",
    "a verb",
    "steel",
    "an atom",
    "history",
    "a river",
)


class Made(NamedTuple):
    """One rollout that vLLM made."""

    kind: str
    rows: int
    request: Request
    """As it was asked for, whatever was sent."""
    said: Completion


def prompts(model: Model) -> list[tuple[int, ...]]:
    texts = [start % thing for thing in THINGS for start in ("Explain in a few words what %s is.", "Once, %s was")]
    return [tuple(model.prompt_ids(text)) for text in [*texts, *(f"{3 + i} + {7 * i} =" for i in range(8))]]


def asked(known: Sequence[tuple[int, ...]], count: int) -> list[Request]:
    return [Request(random.choice(known), secrets.randbits(SEED_BITS), 1.0, BUDGET) for _ in range(count)]


# --- speed -----------------------------------------------------------------------------------------------------------


class Unseeded(VllmEngine):
    """vLLM with its own sampler."""

    def _body(self, request: Request) -> dict[str, Any]:
        body = super()._body(request)
        body["sampling_params"] |= {"temperature": request.temperature, "extra_args": {}}
        return body


def speed(
    known: Sequence[tuple[int, ...]], weights: Tensors, eos: list[int], served: VllmEngine | None, pid: int
) -> list[dict[str, Any]]:
    """Tokens per second of each engine, one batch each: the same prompts, temperature 1, at most 8 new tokens."""
    work = [replace(request, max_new_tokens=QUICK_BUDGET) for request in asked(known, ROWS)]
    rows: list[dict[str, Any]] = []

    def row(name: str, generate: Callable[[], int], process: int = 0) -> None:
        before, cpu = time.monotonic(), _cpu_s(process)
        count = generate()
        taken, spent = time.monotonic() - before, _cpu_s(process) - cpu
        rows.append({"engine": name, "tokens": count, "tok_per_s": round(count / taken, 1),
                     "tok_per_cpu_s": round(count / spent, 1) if spent else None})  # fmt: skip
        say(f"speed: {rows[-1]}")

    for dtype in ("bf16", "fp32"):
        local = engine(SMOL, weights, Kind(f"torch-cpu-{dtype}", rows=ROWS), eos)
        row(f"local {dtype}, seeded", lambda local=local: _count(local.generate(work)))
    model = AutoModelForCausalLM.from_pretrained(SMOL, dtype=torch.bfloat16)
    row("transformers.generate bf16", lambda: _transformers(model, work, eos))
    if served is not None:
        plain = Unseeded(served.url, served._folder, eos_ids=eos, max_rows=ROWS)
        plain._label = served._label
        for number in (1, 2):
            row(f"vLLM bf16, seeded, {number}", lambda: _count(served.generate(work)), pid or -1)
            row(f"vLLM bf16, its own sampling, {number}", lambda: _count(plain.generate(work)), pid or -1)
    return rows


def _cpu_s(process: int) -> float:
    """CPU-seconds of a process and its children, 0 for this one, -1 for one that nobody named."""
    if process < 0:
        return 0.0
    if not process:
        return time.process_time()
    whole = psutil.Process(process)
    return sum(sum(one.cpu_times()[:2]) for one in (whole, *whole.children(recursive=True)))


def _count(found: Sequence[Completion | None]) -> int:
    return sum(len(item.ids) for item in found if item is not None)


def _transformers(model: Any, work: Sequence[Request], eos: list[int]) -> int:
    width = max(len(request.prompt_ids) for request in work)
    ids_BT = torch.tensor([(0,) * (width - len(r.prompt_ids)) + r.prompt_ids for r in work])
    mask_BT = torch.tensor([(0,) * (width - len(r.prompt_ids)) + (1,) * len(r.prompt_ids) for r in work])
    options = {
        "do_sample": True,
        "top_k": 0,
        "max_new_tokens": QUICK_BUDGET,
        "eos_token_id": list(eos),
        "pad_token_id": 2,
    }
    out_BT = model.generate(ids_BT, attention_mask=mask_BT, **options)[:, width:]
    ends = [(row == eos[0]) | (row == eos[1]) for row in out_BT]
    return sum(int(end.int().argmax()) + 1 if end.any() else len(end) for end in ends)


# --- beside each engine's own benchmark ------------------------------------------------------------------------------


def beside(home: Path, folder: Path, *, is_quick: bool) -> dict[str, Any]:
    """Medians and ratios of each engine under farflung and by its own benchmark; vLLM where it is installed."""
    weights, rounds = tensors(SMOL), 1 if is_quick else 3
    common: dict[str, Any] = {"rounds": rounds, "leases": 1 if is_quick else 2, "new": BUDGET}
    local = WorkerSection(engine="torch", device="cpu", slots=ROWS, threads=1)
    found = {"torch": _told(paces(SMOL, weights, local, **common))}
    say(f"beside: {found}")
    if not (home / READY).exists():
        return found | {"vllm": f"skipped: no vLLM in {home}"}
    lengths = Lengths(2 * ROWS, 32, QUICK_BUDGET if is_quick else BUDGET)
    text, config = Text(lengths.prompt, lengths.new), (SMOL / "config.json").read_bytes()
    room = Text(128, 2 * BUDGET)
    cached = cache_bytes(config, torch.bfloat16, room, ROWS)
    size = ServerSize(torch.device("cpu"), max(text.tokens, room.tokens), ROWS, cached, 0.0, 1)
    with serving(home, folder / "server", config, size) as url:
        found["vllm bench throughput"] = _beside_vllm(home, url, folder, weights, size, lengths, rounds)
        say(f"beside: {found}")
        served = WorkerSection(engine="vllm", engine_url=url, slots=ROWS)
        found["vllm"] = _told(paces(SMOL, weights, served, **common))
    return found


def _beside_vllm(
    home: Path, url: str, folder: Path, weights: Tensors, size: ServerSize, lengths: Lengths, rounds: int
) -> dict[str, Any]:
    """By itself, under farflung, and under farflung with the server's own sampling, which nobody could verify."""
    vocab = Model(str(SMOL)).vocab
    options: dict[str, Any] = {"eos_ids": (), "vocab": vocab, "max_rows": WAVES * ROWS}
    served, plain = (kind(url, folder / "weights", **options) for kind in (VllmEngine, Unseeded))
    served.load(weights.items())
    plain._label = served._label
    found: dict[str, list[float]] = {"own": [], "farflung": [], "farflung, own sampling": []}
    for _ in range(rounds):
        work = [
            Request(tuple(random.choices(range(3, vocab), k=lengths.prompt)), secrets.randbits(SEED_BITS), 1.0,
                    lengths.new)
            for _ in range(lengths.count)
        ]  # fmt: skip
        found["own"].append(vllm_throughput(home, SMOL, size, lengths))
        for name, one in (("farflung", served), ("farflung, own sampling", plain)):
            before = time.monotonic()
            found[name].append(_count(one.generate(work)) / (time.monotonic() - before))
        say(f"vLLM: {', '.join(f'{name} {speeds[-1]:.1f}' for name, speeds in found.items())} tokens/s")
    medians = {f"{name}, median": statistics.median(speeds) for name, speeds in found.items()}
    pairs = {name: zip(found[name], found["own"], strict=True) for name in found if name != "own"}
    ratios = {f"{name}, ratio": statistics.median(a / b for a, b in some) for name, some in pairs.items()}
    return medians | ratios | {"rounds": found}


def _told(found: Sequence[Pace]) -> dict[str, Any]:
    medians = {name: statistics.median(getattr(one, name) for one in found) for name in Pace._fields}
    ratios = {
        f"{name}_ratio": statistics.median(getattr(one, name) / one.alone for one in found)
        for name in ("working", "generating")
    }
    return medians | ratios | {"rounds": found}


# --- rollouts --------------------------------------------------------------------------------------------------------


def rollouts(path: Path | None, served: VllmEngine | None, known: Sequence[tuple[int, ...]], tokens: int) -> list[Made]:
    """Those in the file, and as many more as are wanting: `tokens` honest ones, a twelfth of that of each cheat."""
    made = [_read(line) for line in path.read_text().splitlines()] if path and path.exists() else []
    for kind, factor in KINDS.items():
        for rows, share in BATCHES if kind == "honest" else BATCHES[:1]:
            want = tokens * share / (1 if kind == "honest" else 12)
            while served and sum(len(m.said.ids) for m in made if (m.kind, m.rows) == (kind, rows)) < want:
                served.max_rows = rows
                work = asked(known, max(rows, 8))
                said = served.generate([replace(request, temperature=factor) for request in work])
                new = [Made(kind, rows, *pair) for pair in zip(work, said, strict=True) if pair[1] is not None]
                made += new
                _keep(path, new)
                say(f"{kind} x{rows}: {sum(len(m.said.ids) for m in made if m.kind == kind)} tokens")
    return made


def _read(line: str) -> Made:
    kind, rows, ids, seed, t, max_new_tokens, said, logp = json.loads(line)
    return Made(kind, rows, Request(tuple(ids), seed, t, max_new_tokens), Completion(tuple(said), tuple(logp)))


def _keep(path: Path | None, made: Sequence[Made]) -> None:
    if path is not None:
        with path.open("a") as file:
            for m in made:
                r = m.request
                row = (m.kind, m.rows, r.prompt_ids, r.seed, r.temperature, r.max_new_tokens, m.said.ids, m.said.logp)
                file.write(json.dumps(row) + "\n")


# --- verdicts --------------------------------------------------------------------------------------------------------


class Views(NamedTuple):
    """What each verifier saw."""

    fp32: dict[str, list[Seen]]
    """By kind, "unseeded" among them: honest text that was judged by other seeds."""
    bf16: list[Seen]
    """Of one honest rollout in four."""


def look(made: Sequence[Made], verifiers: Mapping[str, LocalEngine]) -> Views:
    fp32 = {kind: list(_seen(verifiers["fp32"], [m for m in made if m.kind == kind])) for kind in KINDS}
    honest = [m for m in made if m.kind == "honest"]
    other = [m._replace(request=replace(m.request, seed=secrets.randbits(SEED_BITS))) for m in honest[1::8]]
    fp32["unseeded"] = list(_seen(verifiers["fp32"], other))
    return Views(fp32, list(_seen(verifiers["bf16"], honest[::4])))


def _seen(verifier: LocalEngine, made: Sequence[Made]) -> Iterator[Seen]:
    for start in range(0, len(made), 64):
        say(f"replaying from {start} of {len(made)}")
        items = [(m.request, m.said.ids) for m in made[start : start + 64]]
        yield from (Seen(found.gap, found.margin, found.pick, found.lead) for found in verifier.replay(items))


def verdicts(views: Views, tolerance: float) -> dict[str, Any]:
    """Calibrated on every other honest rollout, judged on the others and on the cheats."""
    honest = views.fp32["honest"]
    profile = bounds.calibrate(NAME, [*honest[::2], *views.bf16[::2]], tolerance=tolerance, **ABOUT)
    judged = {"honest": honest[1::2], "honest, bf16 verifier": views.bf16[1::2]}
    judged |= {kind: seen for kind, seen in views.fp32.items() if kind != "honest"}
    rng = np.random.default_rng(1)
    return {"tolerance": tolerance, "calibrated_on": profile.honest.tokens,
            "kinds": {kind: _row(profile, seen, rng) for kind, seen in judged.items()}}  # fmt: skip


def _row(profile: Profile, seen: Sequence[Seen], rng: np.random.Generator) -> dict[str, Any]:
    found = findings(profile, seen)
    tokens, pool = sum(one.tokens for one in found), np.array(found, dtype=object)
    ends = [until_caught(lambda: list(rng.choice(pool, SIZE)), 40) for _ in range(10)]
    caught = [end for end in ends if end is not None]
    nats, margin = bounds.growth(profile, seen), np.concatenate([one.margin for one in seen])
    row = {
        "tokens": tokens, "flipped": round(sum(one.flips for one in found) / tokens, 4),
        "mean_margin": round(float(margin.mean()), 5), "max_margin": round(float(margin.max()), 3),
        "nats_per_token": round(nats, 5), "caught": f"{len(caught)} of {len(ends)}",
        "submissions": statistics.median(end[0] for end in caught) if caught else None,
        "tokens_until_caught": statistics.median(end[1] for end in caught) if caught else None,
        "bound_tokens": round(math.log(1 / SETTINGS.false_ejection_probability) / nats) if nats else None,
    }  # fmt: skip
    say(f"verdict: {row}")
    return row


def write(views: Views, path: Path, tolerance: float) -> dict[str, Any]:
    """The profile that all honest rollouts give."""
    honest = [*views.fp32["honest"], *views.bf16]
    profile = bounds.calibrate(NAME, honest, {"unseeded": views.fp32["unseeded"]}, tolerance=tolerance, **ABOUT)
    path.write_bytes(evidence.to_json(msgspec.structs.replace(profile, holds_published=False)) + b"\n")
    return {"positions": profile.honest.positions, "flips": profile.honest.flips, "q0": profile.q0}


def logp_error(made: Sequence[Made], verifier: LocalEngine) -> float:
    """Mean distance of vLLM's log-probabilities from a float32 prefill's, over some honest rollouts."""
    apart: list[float] = []
    for m in [m for m in made if m.kind == "honest"][:16]:
        ids = torch.tensor([m.request.prompt_ids + m.said.ids])
        with torch.inference_mode():
            logp_TV = verifier.model(ids).logits[0].float().log_softmax(-1)
        begin = len(m.request.prompt_ids) - 1
        apart += [abs(float(logp_TV[begin + k, i]) - m.said.logp[k]) for k, i in enumerate(m.said.ids)]
    return statistics.fmean(apart)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--vllm-url", default="")
    parser.add_argument("--vllm-pid", type=int, default=0)
    parser.add_argument("--rollouts", type=Path, help="file that keeps vLLM's rollouts")
    parser.add_argument("--tokens", type=int, default=30_000, help="honest tokens at batch 64")
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--beside", action="store_true", help="each engine beside its own benchmark, nothing else")
    parser.add_argument("--home", type=Path, default=HOME, help="where `farflung engine install` put vLLM")
    parser.add_argument("--profile", type=Path, help="where to write the profile")
    arguments = parser.parse_args()
    if not SMOL.exists():
        sys.stdout.write(json.dumps({"skipped": f"{SMOL} is missing: python scripts/get_smollm2.py"}) + "\n")
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.beside:
            found = beside(arguments.home.expanduser(), Path(folder), is_quick=arguments.quick)
            sys.stdout.write(json.dumps(found) + "\n")
            return
        sys.stdout.write(json.dumps(measure(arguments, Path(folder))) + "\n")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures."""
    model, weights = Model(str(SMOL)), tensors(SMOL)
    eos, known = sorted(model.eos_ids), prompts(model)
    served, why = _serve(arguments.vllm_url, folder, eos)
    if served is not None:
        served.load(weights.items())
    figures: dict[str, Any] = {"quick": arguments.quick, "cpu": torch.backends.cpu.get_cpu_capability()}
    if not arguments.no_speed:
        figures["speed"] = speed(known, weights, eos, served, arguments.vllm_pid)
    made = rollouts(arguments.rollouts, served, known, arguments.tokens // (20 if arguments.quick else 1))
    if not made:
        return figures | {"vllm": f"skipped: {why}"}
    verifiers = {dtype: engine(SMOL, weights, Kind(f"torch-cpu-{dtype}"), eos) for dtype in ("fp32", "bf16")}
    views = look(made, verifiers)
    figures["logp_error"] = logp_error(made, verifiers["fp32"])
    figures["verdicts"] = [verdicts(views, tolerance) for tolerance in (TOLERANCE, 2e-2)]
    if arguments.profile:
        figures["profile"] = write(views, arguments.profile, TOLERANCE)
    return figures


def _serve(url: str, folder: Path, eos: Sequence[int]) -> tuple[VllmEngine | None, str]:
    if not url:
        return None, "no --vllm-url"
    try:
        return VllmEngine(url, folder, eos_ids=eos, vocab=Model(str(SMOL)).vocab, max_rows=ROWS), ""
    except Unreachable as error:
        return None, str(error)


if __name__ == "__main__":
    main()
