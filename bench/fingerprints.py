"""Which activation fingerprint for short outputs: top-k values or a seeded projection, on a real model and its cheats.

Prints one JSON object as its last line. Cheats and honest nodes generate 16 tokens; what their output head was fed is
compared with what a verifier's prefill of the same text feeds it. Outputs of n tokens are stretches of n positions, so
every rollout serves 16 ÷ n times. `detected` is the share farther away than every honest output; `auc` the chance that
a cheat's output is farther than an honest one. `--quick` takes 8 prompts instead of 48, and
int4 and int8 alone of the cheats; the full command is `python bench/fingerprints.py`. `--states FILE` keeps the
activations in a file and uses them the next time. `--toploc-python PATH`, an interpreter with toploc built from source
(`pip install --no-build-isolation --no-binary toploc toploc`), adds that package on the same activations.
Needs models/smollm2-135m (scripts/get_smollm2.py).
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from verification import SMOL, Kind, Tensors, engine, say, tensors

from farflung.engine import decode
from farflung.engine import replay as replaying
from farflung.engine.arithmetic import rounded
from farflung.engine.base import Request
from farflung.engine.fingerprint_tap import Sketches, tapped
from farflung.engine.local import LocalEngine
from farflung.protocol.fingerprint import signs
from farflung.tasks.create_run import Model
from farflung.trust.fingerprint_distance import bound

TOKENS = 16
QUICK = ("int4", "int8")
LENGTHS = (1, 2, 4, 8, 16)
NONCE, OTHER_NONCE = "ab" * 32, "cd" * 32
WORDS = (
    *("gravity", "a cell", "rain", "love", "Paris", "jazz", "salt", "a verb", "steel", "an atom", "history", "Rome"),
    *("a fox", "tea", "glass", "the moon", "a river", "sleep", "paper", "a bee", "ice", "a poem", "gold", "wind"),
)
FORMS = (
    "Explain in a few words what {} is.",
    "Question: is {} older than writing? Answer:",
    "Write one line about {}.\n",
    "{} and time are alike, for",
)
States = dict[str, np.ndarray]
"""`NAME|sent` and `NAME|seen` → float32 (rollouts, positions, D)."""
Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Activations of the sender and of the verifier, (outputs, n, D) → how far the fingerprint is, (outputs,)."""


# --- activations -----------------------------------------------------------------------------------------------------


class Watching(decode.DecodeBatch):
    """Live rows that keep what the head was fed, a list per batch: as all end together, none joins one under way."""

    batches: ClassVar[list[list[Any]]] = []

    def join(self, *arguments: Any) -> None:
        super().join(*arguments)
        self.batches.append([self.fed_BD])

    def advance(self, token_B: torch.Tensor) -> None:
        super().advance(token_B)
        self.batches[-1].append(self.fed_BD)


def generate(maker: LocalEngine, asked: Sequence[Request], rows: int) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """The ids of each request, and what the head was fed for each, (R, T, D). Nothing ends before its limit."""
    maker.find_ways()  # by rows that nobody watches
    maker.max_rows, plain = rows, decode.DecodeBatch
    Watching.batches.clear()
    decode.DecodeBatch = Watching
    done = maker.generate(asked)
    decode.DecodeBatch = plain
    order = sorted(range(len(asked)), key=lambda index: decode.first(asked[index]))
    fed = torch.cat([torch.stack(batch[:TOKENS], dim=1) for batch in Watching.batches])
    return [item.ids for item in done], fed[torch.tensor(order).argsort()].numpy()


@torch.inference_mode()
def prefill(verifier: LocalEngine, items: Sequence[tuple[Request, tuple[int, ...]]], rows: int = 16) -> np.ndarray:
    """What the head is fed in one pass over each text, (R, T, D)."""
    parts: list[torch.Tensor] = []
    for start in range(0, len(items), rows):
        some = items[start : start + rows]
        with tapped(verifier.model, [request for request, _ in some]) as tap:
            order = [index for index, _ in replaying.read(verifier.model, some, "padded")]
        parts.append(tap.fed_BD.view(len(some), TOKENS, -1)[torch.tensor(order).argsort()])
    return torch.cat(parts).numpy()


def weights_of_cheats(weights: Tensors) -> dict[str, Callable[[], Tensors]]:
    """Name → what else a cheat, or a node that is not up to date, may compute with."""

    def shaken(scale: float, only: str = "") -> Tensors:
        made = torch.Generator().manual_seed(1)
        return {
            name: (t.float() * (1 + scale * torch.randn(t.shape, generator=made))).bfloat16() if only in name else t
            for name, t in weights.items()
        }

    def stale(step: float) -> Tensors:
        return {name: (t.float() - step * t.float().sign()).bfloat16() for name, t in weights.items()}

    return {
        "int4": lambda: dict(rounded(weights.items(), 4)),
        "int8": lambda: dict(rounded(weights.items(), 8)),
        "noise 1 %": lambda: shaken(0.01),
        "noise 3 %": lambda: shaken(0.03),
        "one layer 10 %": lambda: shaken(0.1, ".layers.14.mlp.down_proj"),
        "stale 1e-5": lambda: stale(1e-5),
        "stale 1e-4": lambda: stale(1e-4),
    }


def one_token_changed(request: Request) -> Request:
    ids = list(request.prompt_ids)
    ids[len(ids) // 2] = (ids[len(ids) // 2] * 7 + 11) % 40_000
    return replace(request, prompt_ids=tuple(ids))


def collect(prompts: int, *, is_quick: bool = False) -> States:
    """Honest pairs of generator and verifier, and cheats against the float32 verifier."""
    model, weights = Model(str(SMOL)), tensors(SMOL)
    texts = [form.format(word) for word in WORDS for form in FORMS][:prompts]
    seeds = np.random.default_rng(1).integers(0, 2**62, len(texts)).tolist()
    asked = [
        Request(tuple(model.prompt_ids(text)), seed, 1.0, TOKENS, NONCE)
        for text, seed in zip(texts, seeds, strict=True)
    ]
    few = asked[::2]
    exact, coarse = (engine(SMOL, weights, Kind(f"torch-cpu-{kind}"), []) for kind in ("fp32", "bf16"))
    found: States = {}

    def note(name: str, fed: np.ndarray, seen: np.ndarray) -> None:
        found[f"{name}|sent"], found[f"{name}|seen"] = fed, seen
        far = np.linalg.norm(fed - seen, axis=-1) / np.linalg.norm(seen, axis=-1)
        say(f"{name}: relative error median {np.median(far):.4f}, largest {far.max():.4f}")

    def play(name: str, maker: LocalEngine, which: Sequence[Request], sent: Sequence[Request], rows: int = 64) -> None:
        ids, fed = generate(maker, sent, rows)
        note(name, fed, prefill(exact, list(zip(which, ids, strict=True))))

    ids, fed = generate(coarse, asked, 64)
    items = list(zip(asked, ids, strict=True))
    note("bf16 x64", fed, prefill(exact, items))
    again = prefill(coarse, items)
    note("bf16 prefill", again, found["bf16 x64|seen"])
    note("bf16 x64 vs bf16", fed, prefill(coarse, items, rows=5))
    ids, fed = generate(exact, asked, 64)
    items = list(zip(asked, ids, strict=True))
    note("fp32 x64", fed, prefill(exact, items))
    note("fp32 x64 vs bf16", fed, prefill(coarse, items))
    for name, other in weights_of_cheats(weights).items():
        if is_quick and name not in QUICK:
            continue
        play(name, engine(SMOL, other(), Kind("torch-cpu-bf16"), []), few, few)
    if is_quick:
        return found
    play("prompt, one token", coarse, few, [one_token_changed(request) for request in few])
    elsewhere = [replace(r, prompt_ids=o.prompt_ids) for r, o in zip(few, few[3:] + few[:3], strict=True)]
    play("other prompt", coarse, few, elsewhere)
    play("bf16 x7", coarse, few, few, rows=7)
    play("bf16 x1", coarse, asked[:6], asked[:6], rows=1)
    return found


def is_honest(name: str) -> bool:
    return name.startswith(("bf16", "fp32"))


def honest_pairs(states: States) -> list[str]:
    """Without float32 against itself, whose distance is nothing and would flatter every candidate."""
    names = {name.partition("|")[0] for name in states}
    return sorted(name for name in names if is_honest(name) and name != "fp32 x64")


def outputs(states: States, name: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Sender's and verifier's activations of every stretch of n positions, (outputs, n, D)."""
    sent, seen = states[f"{name}|sent"], states[f"{name}|seen"]
    return sent.reshape(-1, n, sent.shape[-1]), seen.reshape(-1, n, seen.shape[-1])


# --- the two candidates ----------------------------------------------------------------------------------------------


@functools.cache
def signs_of(nonce: str, width: int, numbers: int) -> np.ndarray:
    """As many signs as asked for, from one hash after the other: the shipped fingerprint has 32 numbers."""
    halves = [signs(nonce[:-2] + f"{part:02x}", width) for part in range(-(-numbers // 32))]
    return np.concatenate(halves, axis=-1)[:, :, :numbers].astype(np.float32)


def sketch(fed: np.ndarray, numbers: int, nonce: str = NONCE) -> np.ndarray:
    unit = fed / np.maximum(np.linalg.norm(fed, axis=-1, keepdims=True), 1e-12)
    n = fed.shape[1]
    return np.einsum("rnd,ndk->rk", unit, signs_of(nonce, fed.shape[-1], numbers)[:n], optimize=True) / n**0.5


def stepped(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Rounded to so many bits over ±4 standard deviations."""
    most = 2 ** (bits - 1) - 1
    return np.clip(np.rint(numbers * most / 4), -most, most) * 4 / most


def projection(size_bytes: int, bits: int) -> Distance:
    """Root mean square difference of the rounded numbers from the verifier's."""
    numbers = 8 * size_bytes // bits

    def far(sent: np.ndarray, seen: np.ndarray) -> np.ndarray:
        difference = stepped(sketch(sent, numbers), bits) - sketch(seen, numbers)
        return np.sqrt(np.mean(np.square(difference), axis=-1))

    return far


def top_k(size_bytes: int, summary: Callable[..., np.ndarray]) -> Distance:
    """Relative error, sign included, of the values at the verifier's k largest places; 1 where the sender has another.

    2 bytes a value: places are not sent where a polynomial over a fixed prime carries them (congruence, below); the
    verifier's own places are looked up, and at a place that was not sent the polynomial says something arbitrary.
    """
    k = size_bytes // 2

    def far(sent: np.ndarray, seen: np.ndarray) -> np.ndarray:
        mine, theirs = seen.reshape(len(seen), -1), as_bf16(sent.reshape(len(sent), -1))
        place = np.argpartition(-np.abs(mine), k, axis=1)[:, :k]
        has = np.zeros(mine.shape, bool)
        np.put_along_axis(has, np.argpartition(-np.abs(theirs), k, axis=1)[:, :k], True, 1)
        value, wanted = np.take_along_axis(theirs, place, 1), np.take_along_axis(mine, place, 1)
        error = np.minimum(1, np.abs(value - wanted) / np.maximum(np.abs(wanted), 1e-12))
        return summary(np.where(np.take_along_axis(has, place, 1), error, 1.0), axis=1)

    return far


def as_bf16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().float().numpy()


PRIME = 65_521
"""The largest below 2^16, fixed for all: no prover chooses it. Only bit patterns of NaN lie above it."""


def congruence(places: Sequence[int], values: Sequence[int]) -> list[int]:
    """Coefficients of the polynomial over the prime field with these values at these places (Newton's form)."""
    table = list(values)
    for order in range(1, len(places)):
        for i in range(len(places) - 1, order - 1, -1):
            step = pow(places[i] - places[i - order], -1, PRIME)
            table[i] = (table[i] - table[i - 1]) * step % PRIME
    return table


def value_at(newton: Sequence[int], places: Sequence[int], place: int) -> int:
    """The polynomial there (Horner)."""
    total = 0
    for c, x in zip(reversed(newton), reversed(places), strict=True):
        total = (total * (place - x) + c) % PRIME
    return total


def check_congruence(rng: np.random.Generator) -> None:
    """Both ways of sending say the same at every place that was sent."""
    places = rng.permutation(PRIME)[:16].tolist()
    values = rng.integers(0, PRIME, 16).tolist()
    newton = congruence(places, values)
    if [value_at(newton, places, place) for place in places] != values:
        raise ValueError("the polynomial does not give the values back")


CANDIDATES: dict[str, Distance] = {
    **{
        f"projection {size} bytes, {bits} bits": projection(size, bits)
        for size, bits in ((8, 8), (16, 4), (16, 8), (32, 4), (32, 8), (32, 16), (64, 8))
    },
    **{
        f"top-{size // 2} {name}, {size} bytes": top_k(size, summary)
        for size in (8, 16, 32, 64)
        for name, summary in (("mean", np.mean), ("median", np.median))
    },
}
KEPT = "projection 32 bytes, 8 bits"


# --- comparison ------------------------------------------------------------------------------------------------------


def auc(honest: np.ndarray, cheat: np.ndarray) -> float:
    """The chance that a cheat's distance exceeds an honest one's, ties counted half (Mann & Whitney 1947)."""
    ranks = np.searchsorted(np.sort(honest), cheat, "left") + np.searchsorted(np.sort(honest), cheat, "right")
    return float(ranks.mean() / 2 / len(honest))


def forgeries(states: States, n: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Activations that a forger may put in the place of those that it did not compute."""
    sent, seen = outputs(states, "bf16 x64", n)
    rng = np.random.default_rng(3)
    yield "zeros", np.zeros_like(sent), seen
    yield "constant", np.broadcast_to(sent[0], sent[1:].shape).copy(), seen[1:]
    yield "mean of many", np.broadcast_to(sent.mean(axis=0), sent.shape).copy(), seen
    yield "table: another prompt's", np.roll(sent, 3 * TOKENS // n, axis=0), seen
    yield "random", rng.normal(size=sent.shape).astype(np.float32), seen


def compare(states: States, far: Distance) -> list[dict[str, Any]]:
    """A row per output length: the farthest honest, and for every cheat AUC and share detected beyond it."""
    names = sorted({name.partition("|")[0] for name in states})
    rows: list[dict[str, Any]] = []
    for n in LENGTHS:
        honest = np.concatenate([far(*outputs(states, name, n)) for name in honest_pairs(states)])
        cheats = [(name, *outputs(states, name, n)) for name in names if not is_honest(name)]
        row: dict[str, Any] = {"tokens": n, "honest": len(honest), "farthest_honest": round(float(honest.max()), 4)}
        for name, sent, seen in (*cheats, *forgeries(states, n)):
            found = far(sent, seen)
            row[name] = {
                "auc": round(auc(honest, found), 4),
                "detected": round(float((found > honest.max()).mean()), 4),
                "nearest": round(float(found.min()), 4),
            }
        rows.append(row)
    return rows


def copied(states: States) -> float:
    """Distance of the nearest fingerprint that was copied, bytes and all, from another lease."""
    sent, seen = outputs(states, "bf16 x64", 1)
    return float(np.sqrt(np.mean(np.square(sketch(sent, 32, OTHER_NONCE) - sketch(seen, 32)), axis=-1)).min())


def pooled(states: States, size: int = 16) -> dict[str, float]:
    """√ of the mean squared distance over one-token outputs of a submission: farthest honest, nearest cheats."""
    far, rng = CANDIDATES[KEPT], np.random.default_rng(4)
    found: dict[str, float] = {"farthest_honest": 0.0}
    for name in sorted({name.partition("|")[0] for name in states}):
        one = far(*outputs(states, name, 1))
        some = np.sqrt(np.mean(np.square(rng.choice(one, (500, size))), axis=1))
        if is_honest(name):
            found["farthest_honest"] = max(found["farthest_honest"], round(float(some.max()), 4))
        else:
            found[name] = round(float(some.min()), 4)
    return found


def at_the_bound(states: States) -> dict[str, Any]:
    """The share that the bound of a profile calibrated on these honest outputs fails, by number of tokens."""
    far = CANDIDATES[KEPT]
    honest = [float(far(*outputs(states, name, n)).max()) for name in honest_pairs(states) for n in LENGTHS]
    most = bound(honest)
    cheats = sorted({name.partition("|")[0] for name in states if not is_honest(name)})
    failed = {
        name: {n: round(float((far(*outputs(states, name, n)) > most).mean()), 4) for n in LENGTHS} for name in cheats
    }
    forged = {name: round(float((far(sent, seen) > most).mean()), 4) for name, sent, seen in forgeries(states, 1)}
    return {"bound": round(most, 4), "failed": failed, "forged_one_token": forged}


def price(rounds: int) -> dict[str, float]:
    """CPU time of generation with fingerprints over without, interleaved; and what the sketches alone take."""
    model, weights = Model(str(SMOL)), tensors(SMOL)
    maker = engine(SMOL, weights, Kind("torch-cpu-fp32"), [])
    prompts = [tuple(model.prompt_ids(form.format(word))) for word in WORDS[:4] for form in FORMS]
    asked = [Request(prompt, 7 + i, 1.0, TOKENS) for i, prompt in enumerate(prompts)]
    ratios: list[float] = []
    for number in range(rounds + 1):
        taken: dict[str, float] = {}
        for nonce in ("", NONCE) if number % 2 else (NONCE, ""):
            before = time.process_time()
            maker.generate([replace(request, nonce=nonce) for request in asked])
            taken[nonce] = time.process_time() - before
        ratios.append(taken[NONCE] / taken[""])
        plain = taken[""]
    before = time.process_time()
    sketches = Sketches([replace(request, nonce=NONCE) for request in asked], 576, maker.model.device)
    fed_BD, row_B = torch.randn(len(asked), 576), torch.arange(len(asked))
    for position in range(TOKENS):
        sketches.add(fed_BD, row_B, position)
    sketches.packed()
    own_s = time.process_time() - before
    return {"ratio": round(statistics.median(ratios[1:]), 4), "sketches_share": round(own_s / plain, 5)}


# --- all of it -------------------------------------------------------------------------------------------------------


def side_by_side(states: States, python: Path | None) -> dict[str, Any] | str:
    """The same activations through toploc, in its own interpreter."""
    if python is None:
        return "skipped: no --toploc-python"
    child = Path(__file__).with_name("toploc_child.py")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "states.npz"
        np.savez(path, **states)
        done = subprocess.run([str(python), str(child), str(path)], capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if not done.returncode else f"skipped: {done.stderr.strip().splitlines()[-1]}"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--states", type=Path, help="file of activations to make, or to use if it is there")
    parser.add_argument("--toploc-python", type=Path, help="interpreter of an environment with toploc")
    arguments = parser.parse_args()
    if not SMOL.exists():
        sys.stdout.write(json.dumps({"skipped": f"{SMOL} is missing: python scripts/get_smollm2.py"}) + "\n")
        return
    check_congruence(np.random.default_rng(2))
    if arguments.states and arguments.quick:  # fewer prompts and cheats: not to be taken for the full ones
        arguments.states = arguments.states.with_name(f"quick-{arguments.states.name}")
    if arguments.states and arguments.states.exists():
        states = dict(np.load(arguments.states))
    else:
        states = collect(8 if arguments.quick else 48, is_quick=arguments.quick)
        if arguments.states:
            np.savez(arguments.states, **states)
    figures: dict[str, Any] = {
        "quick": arguments.quick,
        "kept": KEPT,
        "candidates": {name: compare(states, far) for name, far in CANDIDATES.items()},
        "at_the_bound": at_the_bound(states),
        "copied_nearest": round(copied(states), 3),
        "submission_of_16_one_token_outputs": pooled(states),
        "price": price(3 if arguments.quick else 11),
        "toploc": side_by_side(states, arguments.toploc_python),
    }
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
