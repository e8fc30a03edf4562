"""How fast the embedded engine decodes: SmolLM2, 64 rows at a time, against `transformers.generate` and a prefill.

    python bench/decoding.py [--quick] [--vllm-url URL]

Prompts of eight rows each, random ids, float32, temperature 1, no end token; prompts and new tokens as in `WORK`.
`ragged` rows end after one quarter to all of the new tokens, as completions do: `generate` goes on until the longest
is done, and only what was asked for counts. Where there are more than 64 rows, `generate` takes 64 after 64. A prefill
is one forward pass over 64 rows of prompt and new tokens, without the output head. With `--vllm-url` a vLLM server on
the same model (docs/run.md says how to start one, here with `--dtype float32`) does the same work. Best of `REPEATS`
runs each, in turn. Prints one JSON object as its last line.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from verification import SMOL, Kind, engine, say, tensors

from farflung.engine.base import Request
from farflung.engine.heap import keep_freed_memory
from farflung.engine.vllm import VllmEngine

ROWS, SAMPLES, REPEATS = 64, 8, 2
WORK = ((45, 24, 8), (200, 32, 8), (400, 32, 8), (45, 32, 32))
"""(positions of a prompt, new tokens, prompts)."""


def asked(prompt: int, new: int, groups: int, *, is_ragged: bool) -> list[Request]:
    chance = random.Random(prompt)
    prompts = [tuple(chance.randrange(1000, 40_000) for _ in range(prompt)) for _ in range(groups)]
    budgets = [chance.randint(new // 4, new) if is_ragged else new for _ in range(groups * SAMPLES)]
    budgets[0] = new
    return [Request(prompts[i // SAMPLES], i, 1.0, budget) for i, budget in enumerate(budgets)]


def best_s(work: Callable[[], Any], repeats: int) -> float:
    taken: list[float] = []
    for _ in range(repeats):
        before = time.perf_counter()
        work()
        taken.append(time.perf_counter() - before)
    return min(taken)


def rate(requests: Sequence[Request], taken_s: float) -> float:
    return round(sum(request.budget for request in requests) / taken_s, 1)


def by_transformers(model: PreTrainedModel, requests: Sequence[Request]) -> None:
    new = max(request.budget for request in requests)
    for ids in torch.tensor([request.prompt_ids for request in requests]).split(ROWS):
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=True,
                top_k=0,
                pad_token_id=0,
            )


def prefill(model: PreTrainedModel, positions: int) -> None:
    with torch.inference_mode():
        model.base_model(torch.randint(1000, 40_000, (ROWS, positions)), use_cache=False)


def row(
    prompt: int, new: int, groups: int, repeats: int, model: PreTrainedModel, local: Any, served: Any
) -> dict[str, Any]:
    """One workload, all engines."""
    even, ragged = (asked(prompt, new, groups, is_ragged=is_ragged) for is_ragged in (False, True))
    engines = {"farflung": local} | ({"vllm": served} if served else {})
    found: dict[str, Any] = {"prompt": prompt, "new": new, "rows": len(even)}
    for name, one in engines.items():
        short = [k for k, done in enumerate(one.generate(even)) if done is None or len(done.ids) != even[k].budget]
        if short:
            raise SystemExit(f"{name} ended {len(short)} rows early, the first is {short[0]}")
        found[name] = rate(even, best_s(lambda one=one: one.generate(even), repeats))
        found[f"{name}_ragged"] = rate(ragged, best_s(lambda one=one: one.generate(ragged), repeats))
    taken_s = best_s(lambda: by_transformers(model, even), repeats)
    found |= {"generate": rate(even, taken_s), "generate_ragged": rate(ragged, taken_s)}
    found["prefill"] = round(ROWS * (prompt + new) / best_s(lambda: prefill(model, prompt + new), repeats), 1)
    for kind in ("", "_ragged"):
        found[f"ratio{kind}"] = round(found[f"farflung{kind}"] / found[f"generate{kind}"], 2)
    found["of_prefill"] = round(found["farflung"] / found["prefill"], 2)
    say(json.dumps(found))
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the first workload once")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--vllm-url", default="")
    options = parser.parse_args()
    if not SMOL.exists():
        raise SystemExit(f"{SMOL} is missing; make it with python scripts/get_smollm2.py")
    keep_freed_memory()
    weights = tensors(SMOL)
    with tempfile.TemporaryDirectory() as folder:
        served = None
        if options.vllm_url:
            served = VllmEngine(options.vllm_url, Path(folder), eos_ids=(), max_rows=ROWS)
            served.load(weights.items())
        local = engine(SMOL, weights, Kind("torch-cpu-fp32", rows=ROWS), ())
        torch.set_num_threads(options.threads)
        model = AutoModelForCausalLM.from_pretrained(SMOL, dtype=torch.float32)
        work, repeats = (WORK[:1], 1) if options.quick else (WORK, REPEATS)
        rows = [row(*one, repeats, model, local, served) for one in work]
    figures = {"threads": options.threads, "cpu": torch.backends.cpu.get_cpu_capability(), "rows": rows}
    sys.stdout.write(json.dumps(figures | {"load_average": os.getloadavg()[0]}) + "\n")


if __name__ == "__main__":
    main()
