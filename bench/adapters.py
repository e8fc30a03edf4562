"""Adapters alone against merged differences on SmolLM2-135M: bytes a step, time of the merge, what rounding costs.

Prints one JSON object as its last line. Trains adapters on right and wrong answers to sums, and looks after each step
at what would be published. By form there is KL in nats a token between the policy in training and what nodes would
load, over all positions of some answers: `merged` from the masters, `int16` as adapters are published, and for
comparison `int8` and `bfloat16` adapters. `merge_s` is the median time of merging all matrices, without digests and
files, by threads. Needs models/smollm2-135m (scripts/get_smollm2.py). `--quick` measures the same of one rank at one
rate after one step; the full command is `python bench/adapters.py`.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import kl_div

from farflung.learner.lora import layer_of, published
from farflung.learner.optimise import Learner, Optimisation
from farflung.learner.pack import Rollout, Segment, pack
from farflung.learner.policy import Policy
from farflung.numerics import merge as merging
from farflung.numerics.merge import Factors, merge
from farflung.numerics.rounding import dithered
from farflung.tasks.create_run import Model
from farflung.weights import delta
from farflung.weights.publish import SHARD_BYTES

ROOT = Path(__file__).parents[1]
SMOL = ROOT / "models" / "smollm2-135m"
RANKS, RATES, STEPS, PROBLEMS, THREADS, ROUNDS = (8, 32), (1e-4, 1e-3), 3, 8, (1, 2), 3
Weights = dict[str, torch.Tensor]


def say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%X')} {text}\n")


def sums(rng: np.random.Generator, count: int) -> list[tuple[str, list[str]]]:
    """Prompts, and four answers to each, the first one right."""
    return [
        (f"What is {a} + {b}? The answer is", [f" {a + b + (k > 0) * int(rng.integers(1, 30))}." for k in range(4)])
        for a, b in rng.integers(0, 100, (count, 2))
    ]


def batch(model: Model, rng: np.random.Generator) -> list[Rollout]:
    rollouts: list[Rollout] = []
    for prompt, answers in sums(rng, PROBLEMS):
        start = Segment("prompt", tuple(model.prompt_ids(prompt)))
        for k, answer in enumerate(answers):
            ids = tuple(model.tokenizer.encode(answer).ids)
            rollouts.append(Rollout((start, Segment("model", ids)), 1.7 if k == 0 else -0.58, 1.0))
    return rollouts


def probes(model: Model) -> list[list[int]]:
    found = sums(np.random.default_rng(9), PROBLEMS)
    return [[*model.prompt_ids(prompt), *model.tokenizer.encode(answers[0]).ids] for prompt, answers in found]


# --- what may be published -------------------------------------------------------------------------------------------


def adapted_names(policy: Policy) -> list[str]:
    return [one.name for one in policy.factors()]


def from_masters(policy: Policy, name: str) -> torch.Tensor:
    """Of the product in float32."""
    layer = layer_of(policy.model, name)
    assert layer is not None, "only matrices with an adapter are asked for"
    return dithered((layer.weight + layer.scale * (layer.lora_B @ layer.lora_A)).detach())


def as_bfloat16(policy: Policy, name: str) -> torch.Tensor:
    layer = layer_of(policy.model, name)
    assert layer is not None, "only matrices with an adapter are asked for"
    product = layer.lora_B.bfloat16().float() @ layer.lora_A.bfloat16().float()
    return dithered((layer.weight + layer.scale * product).detach())


def as_whole_numbers(bits: int) -> Callable[[Policy, str], torch.Tensor]:
    """As published with 15 bits beside the sign."""

    def form(policy: Policy, name: str) -> torch.Tensor:
        before, merging.BITS = merging.BITS, bits
        try:
            layer = layer_of(policy.model, name)
            assert layer is not None, "only matrices with an adapter are asked for"
            return published(layer, name)
        finally:
            merging.BITS = before

    return form


FORMS = {"merged": from_masters, "int16": as_whole_numbers(15), "int8": as_whole_numbers(7), "bfloat16": as_bfloat16}


# --- measurements ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model: Any, texts: list[list[int]]) -> torch.Tensor:
    return torch.cat([model(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in texts])


def mismatch(policy: Policy, plain: Any, names: list[str], texts: list[list[int]]) -> dict[str, float]:
    """By form, KL of what nodes would load from what is in training."""
    told, slots = logits(policy.model, texts), plain.state_dict()
    found: dict[str, float] = {}
    for kind, form in FORMS.items():
        for name in names:
            slots[name].copy_(form(policy, name))
        held = logits(plain, texts)
        found[kind] = float(kl_div(held, told, reduction="none", log_target=True).sum(-1).mean())
    return found


def shards(weights: Weights) -> Iterator[list[np.ndarray]]:
    """Values by shard, as published."""
    chunk: list[np.ndarray] = []
    for tensor in weights.values():
        if chunk and sum(one.nbytes for one in chunk) + tensor.nbytes > SHARD_BYTES:
            yield chunk
            chunk = []
        chunk.append(tensor.reshape(-1).view(torch.int16).numpy().view(np.uint16))
    yield chunk


def difference_bytes(before: Weights, after: Weights) -> int:
    return sum(len(delta.encode(old, new)) for old, new in zip(shards(before), shards(after), strict=True))


def merge_s(base: Weights, adapters: list[Factors], threads: int) -> float:
    torch.set_num_threads(threads)
    took: list[float] = []
    for _ in range(ROUNDS):
        before = time.perf_counter()
        for one in adapters:
            merge(base[one.name], one)
        took.append(time.perf_counter() - before)
    torch.set_num_threads(max(THREADS))
    return statistics.median(took)


def published_merged(policy: Policy, names: list[str]) -> Weights:
    whole = dict(policy.base())
    return {name: from_masters(policy, name) if name in names else tensor for name, tensor in whole.items()}


def row(rank: int, lr: float, count: int) -> dict[str, Any]:
    model, rng = Model(str(SMOL)), np.random.default_rng(1)
    torch.manual_seed(0)
    policy = Policy.from_pretrained(SMOL, is_dithered=True, lora_rank=rank)
    base, adapters = dict(policy.base()), policy.factors()
    timed = {str(threads): merge_s(base, adapters, threads) for threads in THREADS}
    say(f"rank {rank}: merged in {json.dumps(timed)}")
    plain = Policy.from_pretrained(SMOL).model
    learner, texts, names = (
        Learner(policy, Optimisation(lr=lr, max_grad_norm=0.1)),
        probes(model),
        adapted_names(policy),
    )
    before, steps = published_merged(policy, names), []
    for number in range(1, count + 1):
        metrics = learner.step(pack(batch(model, rng), 1024))
        after = published_merged(policy, names)
        steps.append({"difference_bytes": difference_bytes(before, after)} | mismatch(policy, plain, names, texts))
        say(f"rank {rank} lr {lr:.0e} step {number}: loss {metrics.loss:.3f} {json.dumps(steps[-1])}")
        before = after
    return {
        "rank": rank, "lr": lr, "steps": steps, "merge_s": timed,
        "full_bytes": sum(tensor.nbytes for tensor in base.values()),
        "adapter_bytes": sum(one.B.nbytes + one.A.nbytes for one in adapters),
    }  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training; 0 to time merges alone")
    arguments = parser.parse_args()
    if not SMOL.exists():
        sys.stdout.write(
            json.dumps({"rows": [], "skipped": f"{SMOL} is missing: python scripts/get_smollm2.py"}) + "\n"
        )
        return
    torch.set_num_threads(max(THREADS))
    ranks, rates = (RANKS[:1], RATES[:1]) if arguments.quick else (arguments.ranks, arguments.rates)
    steps = 1 if arguments.quick else arguments.steps
    rows = [row(rank, lr, steps) for rank in ranks for lr in rates]
    sys.stdout.write(json.dumps({"rows": rows}) + "\n")


if __name__ == "__main__":
    main()
