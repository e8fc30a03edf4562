"""How fast the embedded engine decodes: SmolLM2, 64 rows at a time, against `transformers.generate` and a prefill.

    python bench/decoding.py [--quick] [--vllm-url URL]

The first workload is what `bench/learn.py` asks for: batches of eight chats, eight rows each, at most 24 new tokens,
which end where the model ends them; what each engine made counts, up to the end token. The others are random ids, eight
rows a prompt, no end token; prompts and new tokens as in `WORK`. Their `ragged` rows end after one quarter to all of
the new tokens: `generate` goes on until the longest is done, and only what was asked for counts. Where there are more
than 64 rows, `generate` takes 64 after 64. All in float32 at temperature 1. A prefill is one forward pass over 64 rows
of prompt and new tokens, without the output head. With `--vllm-url` a vLLM server on the same model (docs/run.md says
how to start one, here with `--dtype float32`) does the work of `WORK`. Best of `REPEATS` runs each, in turn; of the
chats the mean, for `generate` draws others every time. Prints one JSON object as its last line.
`--quick` does the chats and the shortest of the others, once; the full command is `python bench/decoding.py`.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from learn import BUDGET, TASK
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from verification import SMOL, Kind, engine, say, tensors

from farflung.engine.base import Request
from farflung.engine.cpu.malloc import keep_freed_memory
from farflung.engine.local import LocalEngine
from farflung.engine.vllm import VllmEngine
from farflung.envs.reasoning_gym import ReasoningGym

ROWS, SAMPLES, REPEATS, CHATS = 64, 8, 2, 32
WORK = ((45, 24, 8), (200, 32, 8), (400, 32, 8), (45, 32, 32))
"""(positions of a prompt, new tokens, prompts)."""


def asked(prompt: int, new: int, groups: int, *, is_ragged: bool) -> list[Request]:
    chance = random.Random(prompt)
    prompts = [tuple(chance.randrange(1000, 40_000) for _ in range(prompt)) for _ in range(groups)]
    budgets = [chance.randint(new // 4, new) if is_ragged else new for _ in range(groups * SAMPLES)]
    budgets[0] = new
    return [Request(prompts[i // SAMPLES], i, 1.0, max_new_tokens) for i, max_new_tokens in enumerate(budgets)]


def chats(tokenizer: Any) -> list[Request]:
    env = ReasoningGym("chain_sum", **TASK)
    tasks = islice(env.tasks("train"), CHATS)
    prompts = [
        tuple(tokenizer.apply_chat_template(env.prompt(task), add_generation_prompt=True, return_dict=False))
        for task in tasks
    ]
    return [Request(prompt, i * SAMPLES + k, 1.0, BUDGET) for i, prompt in enumerate(prompts) for k in range(SAMPLES)]


def best_s(work: Callable[[], Any], repeats: int) -> float:
    taken: list[float] = []
    for _ in range(repeats):
        before = time.perf_counter()
        work()
        taken.append(time.perf_counter() - before)
    return min(taken)


def rate(requests: Sequence[Request], taken_s: float) -> float:
    return round(sum(request.max_new_tokens for request in requests) / taken_s, 1)


def by_transformers(model: PreTrainedModel, requests: Sequence[Request], eos: int | None = None) -> Iterator[list[int]]:
    """What comes after each prompt; all of one length without an end token."""
    new, width = (
        max(request.max_new_tokens for request in requests),
        max(len(request.prompt_ids) for request in requests),
    )
    ends: dict[str, Any] = {"min_new_tokens": new} if eos is None else {"eos_token_id": eos}
    padded = [[-1] * (width - len(request.prompt_ids)) + list(request.prompt_ids) for request in requests]
    for ids in torch.tensor(padded).split(ROWS):
        with torch.inference_mode():
            made = model.generate(
                ids.clamp(min=0),
                attention_mask=(ids >= 0).long(),
                max_new_tokens=new,
                do_sample=True,
                top_k=0,
                pad_token_id=0,
                **ends,
            )
        yield from made[:, width:].tolist()


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
        short = [
            k for k, done in enumerate(one.generate(even)) if done is None or len(done.ids) != even[k].max_new_tokens
        ]
        if short:
            raise SystemExit(f"{name} ended {len(short)} rows early, the first is {short[0]}")
        found[name] = rate(even, best_s(lambda one=one: one.generate(even), repeats))
        found[f"{name}_ragged"] = rate(ragged, best_s(lambda one=one: one.generate(ragged), repeats))
    taken_s = best_s(lambda: list(by_transformers(model, even)), repeats)
    found |= {"generate": rate(even, taken_s), "generate_ragged": rate(ragged, taken_s)}
    found["prefill"] = prefill_rate(model, prompt + new, repeats)
    for kind in ("", "_ragged"):
        found[f"ratio{kind}"] = round(found[f"farflung{kind}"] / found[f"generate{kind}"], 2)
    found["of_prefill"] = round(found["farflung"] / found["prefill"], 2)
    say(json.dumps(found))
    return found


def prefill_rate(model: PreTrainedModel, positions: int, repeats: int) -> float:
    return round(ROWS * positions / best_s(lambda: prefill(model, positions), repeats), 1)


def row_of_chats(repeats: int, model: PreTrainedModel, weights: Any, threads: int) -> dict[str, Any]:
    """What `bench/learn.py` asks for, ended by the model: tokens made a second, batch by batch in turn."""
    tokenizer = AutoTokenizer.from_pretrained(SMOL)
    eos = int(tokenizer.eos_token_id)
    local = engine(SMOL, weights, Kind("torch-cpu-fp32", rows=ROWS), (eos,))
    torch.set_num_threads(threads)
    asked = chats(tokenizer)
    batches = [asked[start : start + ROWS] for start in range(0, len(asked), ROWS)]
    makers = {"farflung": partial(made_by_us, local), "generate": partial(made_by_transformers, model, eos)}
    for maker in makers.values():
        maker(batches[0])
    seen: dict[str, list[tuple[int, float]]] = {name: [] for name in makers}
    for batch in batches * repeats:
        for name, maker in makers.items():
            before = time.perf_counter()
            seen[name].append((maker(batch), time.perf_counter() - before))
    found: dict[str, Any] = {"prompt": "chats", "new": BUDGET, "rows": ROWS}
    for name, runs in seen.items():
        found[name] = round(sum(tokens for tokens, _ in runs) / sum(taken_s for _, taken_s in runs), 1)
    found["prefill"] = prefill_rate(model, max(len(one.prompt_ids) for one in batches[0]) + BUDGET, repeats)
    found["ratio"] = round(found["farflung"] / found["generate"], 2)
    found["of_prefill"] = round(found["farflung"] / found["prefill"], 2)
    say(json.dumps(found))
    return found


def made_by_us(local: LocalEngine, requests: Sequence[Request]) -> int:
    return sum(len(done.ids) for done in local.generate(requests) if done is not None)


def made_by_transformers(model: PreTrainedModel, eos: int, requests: Sequence[Request]) -> int:
    return sum(ids.index(eos) + 1 if eos in ids else len(ids) for ids in by_transformers(model, requests, eos))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the chats and the first of the others, once")
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
        rows = [row_of_chats(repeats, model, weights, options.threads)]
        rows += [row(*one, repeats, model, local, served) for one in work]
    figures = {"threads": options.threads, "cpu": torch.backends.cpu.get_cpu_capability(), "rows": rows}
    sys.stdout.write(json.dumps(figures | {"load_average": os.getloadavg()[0]}) + "\n")


if __name__ == "__main__":
    main()
