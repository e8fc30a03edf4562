"""How small a step of real training travels, and how fast: SmolLM2-135M, third published step to the fourth.

Prints one JSON object as its last line. Trains with float32 masters on right and wrong answers to sums, then encodes
and applies what would be published. Needs models/smollm2-135m (scripts/get_smollm2.py). `--peers DIR` also runs other
projects' codecs on the same pairs: DIR/grail and DIR/SkyRL are their checkouts, which need the package zstandard.
`--keep DIR` keeps the trained pairs there and takes them from there. Masters are rounded as a run rounds them
(`learn.rounding`), or with `--nearest` each to its neighbour. `--quick` trains on a
quarter of the sums and times once; the full command is `python bench/weights.py`.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from farflung.learner.optimise import Learner, Optimisation
from farflung.learner.pack import Rollout, Segment, pack
from farflung.learner.policy import Policy
from farflung.protocol.digest import digest_of
from farflung.tasks.create_run import Model
from farflung.weights import delta
from farflung.weights.publish import SHARD_BYTES

ROOT = Path(__file__).parents[1]
SMOL = ROOT / "models" / "smollm2-135m"
RATES = (1e-6, 1e-5, 1e-4)
STEPS = 4
THREADS = 2
Tensors = dict[str, torch.Tensor]
Pair = tuple[Tensors, Tensors]


def say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%X')} {text}\n")


# --- training --------------------------------------------------------------------------------------------------------


def batch(model: Model, rng: np.random.Generator, problems: int) -> list[Rollout]:
    """Four answers to each sum, the first one right: advantages of both signs."""
    rollouts: list[Rollout] = []
    for a, b in rng.integers(0, 100, (problems, 2)):
        prompt = Segment("prompt", tuple(model.prompt_ids(f"What is {a} + {b}? The answer is")))
        for k in range(4):
            answer = model.tokenizer.encode(f" {a + b + (k > 0) * int(rng.integers(1, 30))}.").ids
            rollouts.append(Rollout((prompt, Segment("model", tuple(answer))), 1.7 if k == 0 else -0.58, 1.0))
    return rollouts


def trained(lr: float, problems: int, *, is_dithered: bool) -> Pair:
    """What is published of the last step but one and of the last."""
    model, rng = Model(str(SMOL)), np.random.default_rng(1)
    learner = Learner(Policy.from_pretrained(SMOL, is_dithered=is_dithered), Optimisation(lr=lr, max_grad_norm=0.1))
    published: list[Tensors] = []
    for number in range(1, STEPS + 1):
        metrics = learner.step(pack(batch(model, rng, problems), 1024))
        say(f"lr {lr:.0e} step {number}: loss {metrics.loss:.3f}, gradient norm {metrics.grad_norm:.1f}")
        if number >= STEPS - 1:
            published.append({name: tensor.contiguous() for name, tensor in learner.policy.tensors()})
    return published[0], published[1]


def pair(lr: float, problems: int, keep: Path | None, *, is_dithered: bool) -> Pair:
    """As `trained`, from disk where it was done before."""
    files = [keep / f"{lr:.0e}-{step}.safetensors" for step in (STEPS - 1, STEPS)] if keep else []
    if files and all(file.exists() for file in files):
        return load_file(files[0]), load_file(files[1])
    found = trained(lr, problems, is_dithered=is_dithered)
    for file, tensors in zip(files, found, strict=False):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file)
    return found


# --- ours ------------------------------------------------------------------------------------------------------------


def ints(tensor: torch.Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.int16).numpy().view(np.uint16)


def shards(tensors: Tensors) -> Iterator[list[str]]:
    """Names by shard, as published."""
    chunk: list[str] = []
    for name in tensors:
        if chunk and sum(tensors[one].nbytes for one in chunk) + tensors[name].nbytes > SHARD_BYTES:
            yield chunk
            chunk = []
        chunk.append(name)
    yield chunk


def floor_bytes(old: np.ndarray, new: np.ndarray) -> float:
    """Entropy of the share that changed plus the zero-order entropy of the signed differences, of one tensor."""
    is_changed = old != new
    changed = int(is_changed.sum())
    step = delta._rising(new[is_changed]).view(np.int16).astype(int) - delta._rising(old[is_changed]).view(np.int16)
    counts = np.unique(step, return_counts=True)[1] if changed else []
    return (entropy([changed, old.size - changed]) + entropy(counts)) / 8


def entropy(counts: Sequence[int] | np.ndarray) -> float:
    """Bits to tell all of these apart."""
    found = np.array([count for count in counts if count], float)
    return float(-(found * np.log2(found / found.sum())).sum())


def timed(work: Callable[[Any], Any], items: Sequence[Any], size: int, rounds: int) -> tuple[list[Any], float, float]:
    """Results, and bytes per second: median over rounds by the clock, and the same by CPU time over the threads."""
    walls, cpus, results = [], [], []
    with ThreadPoolExecutor(THREADS) as threads:
        for _ in range(rounds):
            wall, cpu = time.perf_counter(), time.process_time()
            results = list(threads.map(work, items))
            walls.append(time.perf_counter() - wall)
            cpus.append((time.process_time() - cpu) / THREADS)
    return results, size / statistics.median(walls), size / statistics.median(cpus)


def ours(before: Tensors, after: Tensors, rounds: int) -> dict[str, Any]:
    """Size and speed of this project's codec, whose result is checked bit for bit."""
    olds = [[ints(before[name]) for name in names] for names in shards(before)]
    news = [[ints(after[name]) for name in names] for names in shards(before)]
    size = sum(tensor.nbytes for tensor in before.values())
    both = list(zip(olds, news, strict=True))
    found, encode_s, encode_cpu = timed(lambda shard: delta.encode(*shard), both, size, rounds)
    jobs = list(zip(found, olds, strict=True))
    patched, apply_s, apply_cpu = timed(
        lambda job: list(delta.decode(*job, [(old.size, old.itemsize) for old in job[1]])), jobs, size, rounds
    )
    for shard, new in zip(patched, news, strict=True):
        if any(a.tobytes() != b.tobytes() for a, b in zip(shard, new, strict=True)):
            raise SystemExit("a patched tensor differs")
    flat = [one for shard in news for one in shard]
    _, digest_s, _ = timed(digest_of, flat, size, rounds)
    return {
        "bytes": sum(map(len, found)), "full_bytes": size,
        "encode_gb_s": encode_s / 1e9, "apply_gb_s": apply_s / 1e9, "digest_gb_s": digest_s / 1e9,
        "encode_gb_s_by_cpu_time": encode_cpu / 1e9, "apply_gb_s_by_cpu_time": apply_cpu / 1e9,
    }  # fmt: skip


# --- peers -----------------------------------------------------------------------------------------------------------


def module(path: Path) -> ModuleType:
    """One file of a checkout, without the packages around it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def grail(folder: Path) -> Callable[[Tensors, Tensors], int]:
    """one-covenant/grail: changed places and values, gaps by row, downscaled, zstd (v3.1)."""
    codec = module(folder / "grail" / "infrastructure" / "sparse_codec.py")

    def size(before: Tensors, after: Tensors) -> int:
        sparse, shapes = {}, {}
        for name, old in before.items():
            where = torch.from_numpy(np.flatnonzero(ints(old) != ints(after[name])).astype(np.int32))
            if len(where):
                sparse |= {f"{name}.indices": where, f"{name}.values": after[name].reshape(-1)[where.long()]}
                shapes[name] = list(old.shape)
        found = codec.encode_sparse_delta_v3_1(sparse, shapes)
        return len(found[0] if isinstance(found, tuple) else found)

    return size


def skyrl(folder: Path) -> Callable[[Tensors, Tensors], int]:
    """NovaSky-AI/SkyRL: exclusive or of each tensor's bytes, zstd level 1; unchanged tensors are left out."""
    payload = module(folder / "skyrl" / "backends" / "skyrl_train" / "weight_sync" / "delta_payload.py")

    def size(before: Tensors, after: Tensors) -> int:
        differences = (ints(old) ^ ints(after[name]) for name, old in before.items())
        return sum(len(payload.compress_bytes(one.tobytes(), level=1)) for one in differences if one.any())

    return size


PEERS = {"grail": ("grail", grail), "skyrl": ("SkyRL", skyrl)}


def find_peers(folder: Path | None) -> tuple[dict[str, Callable[[Tensors, Tensors], int]], dict[str, str]]:
    """The codecs that are there, and of each peer where it is from or why it is absent."""
    codecs, notes = {}, {}
    for name, (place, make) in PEERS.items():
        if folder is None or not (folder / place).is_dir():
            notes[name] = f"absent: no --peers DIR with a checkout in DIR/{place}"
            continue
        try:
            codecs[name] = make(folder / place)
            said = ["git", "-C", str(folder / place), "rev-parse", "HEAD"]
            notes[name] = f"{place} at {subprocess.run(said, capture_output=True, text=True).stdout.strip()}"
        except ImportError as error:
            notes[name] = f"absent: {error}"
    return codecs, notes


# --- all of it -------------------------------------------------------------------------------------------------------


def row(lr: float, before: Tensors, after: Tensors, codecs: dict[str, Any], rounds: int) -> dict[str, Any]:
    pairs = [(ints(old), ints(after[name])) for name, old in before.items()]
    changed = sum(int(np.count_nonzero(old != new)) for old, new in pairs)
    found = ours(before, after, rounds)
    found |= {
        "lr": lr, "changed_fraction": changed / sum(old.size for old, _ in pairs),
        "floor_bytes": round(sum(floor_bytes(old, new) for old, new in pairs)),
        "peers": {name: size(before, after) for name, size in codecs.items()},
    }  # fmt: skip
    found |= {"over_floor": found["bytes"] / found["floor_bytes"], "ratio": found["full_bytes"] / found["bytes"]}
    say(json.dumps(found))
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peers", type=Path, help="folder with checkouts of grail and SkyRL")
    parser.add_argument("--keep", type=Path, help="folder for the trained pairs")
    parser.add_argument("--nearest", action="store_true", help="round masters to nearest instead of dithering")
    arguments = parser.parse_args()
    is_dithered = not arguments.nearest
    if not SMOL.exists():
        sys.stdout.write(
            json.dumps({"rows": [], "skipped": f"{SMOL} is missing: python scripts/get_smollm2.py"}) + "\n"
        )
        return
    torch.set_num_threads(THREADS)
    codecs, notes = find_peers(arguments.peers)
    rows = []
    keep = arguments.keep / "quick" if arguments.keep and arguments.quick else arguments.keep
    for lr in RATES:
        before, after = pair(lr, 2 if arguments.quick else 8, keep, is_dithered=is_dithered)
        rows.append(row(lr, before, after, codecs, 1 if arguments.quick else 5))
    sys.stdout.write(
        json.dumps({"rows": rows, "peers": notes, "dithered": is_dithered, "quick": arguments.quick}) + "\n"
    )


if __name__ == "__main__":
    main()
