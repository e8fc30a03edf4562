"""Nodes on llama.cpp as a verifier sees them: their rounding, and what tells weights coarser than int4.

llama.cpp generates, torch replays in float32 under the canonical int4. One half of the honest rollouts calibrates a
profile, the other is judged by it, and so are cheats: text of llama.cpp too, from other noise, another temperature or
other weights that its format holds. Needs `pip install 'farflung[llama-cpp]'` and models/smollm2-135m
(scripts/get_smollm2.py). `--quick` measures the demo's model at temperature 2 on 4,000 tokens; the full command is
`python bench/few_bits.py`, with `MODEL --temperature T --tokens N` for others.
"""

import argparse
import itertools
import json
import logging
import math
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from farflung.engine.base import Request
from farflung.engine.llama_cpp import LlamaCppEngine, own_llama_cpp
from farflung.engine.local import LocalEngine
from farflung.envs.sums import Sums
from farflung.numerics.quantise import is_quantised, quantised
from farflung.ops.calibrate import CHEATS, engine_of, name_of, numerics_of, published
from farflung.protocol.errors import ConfigError
from farflung.tasks.create_run import Model
from farflung.trust import bounds
from farflung.trust.evidence import ALPHA, Profile, Seen, flips

ROOT = Path(__file__).parents[1]
ROWS, NEW = 48, 32
CHEAT_PART = 0.25
Tensors = list[tuple[str, torch.Tensor]]
log = logging.getLogger(__name__)


def towards_zero(weight_RC: torch.Tensor) -> torch.Tensor:
    """int4 as it should be but for its rounding."""
    return _in_groups(weight_RC, lambda whole: whole.trunc(), 8)


def int3(weight_RC: torch.Tensor) -> torch.Tensor:
    """Half as many values: from -4 to 3 times a scale of the same groups."""
    return _in_groups(weight_RC, lambda whole: whole.round(), 4)


def _in_groups(weight_RC: torch.Tensor, rounded: Callable[[torch.Tensor], torch.Tensor], most: int) -> torch.Tensor:
    group_G32 = weight_RC.float().view(-1, 32)
    step_G1 = group_G32.gather(1, group_G32.abs().argmax(dim=1, keepdim=True)) / -most
    whole_G32 = rounded(torch.where(step_G1 == 0, 0.0, group_G32 / step_G1)).clamp_(-most, most - 1)
    return (whole_G32 * step_G1.half().float()).bfloat16().view(weight_RC.shape)


COARSER = {"int4 towards zero": towards_zero, "int3": int3}


def play(
    engine: LlamaCppEngine,
    verifier: LocalEngine,
    prompts: Sequence[tuple[int, ...]],
    temperature: float,
    tokens: float,
    change: Callable[[Request], Request] = lambda request: request,
) -> tuple[list[Seen], np.ndarray, float]:
    """Until there are so many tokens: what the verifier sees, how log-probabilities differ, seconds of generation."""
    seen: list[Seen] = []
    noise: list[np.ndarray] = []
    size, core_s = 0, 0.0
    endless = itertools.cycle(prompts)
    while size < tokens:
        asked = [Request(next(endless), secrets.randbits(53), temperature, NEW) for _ in range(2 * ROWS)]
        before = time.process_time()
        done = engine.generate([change(one) for one in asked])
        core_s += time.process_time() - before
        replays = verifier.replay([(one, made.ids) for one, made in zip(asked, done, strict=True)])
        for completion, one in zip(done, replays, strict=True):
            seen.append(Seen(one.gap, one.margin, one.pick, one.lead))
            noise.append(np.array(completion.logp) - one.logp)
            size += len(completion.ids)
    return seen, np.concatenate(noise), core_s


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(ROOT / "models" / "smollm2-135m"))
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=5500)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    if asked.quick:
        asked.model, asked.temperature, asked.tokens = str(ROOT / "examples" / "base"), 2.0, 4000
    torch.set_num_threads(1)
    try:
        own_llama_cpp("cpu")
    except ConfigError as error:
        sys.exit(str(error))
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measured(Path(folder), Model(asked.model), asked.temperature, asked.tokens), indent=1))


def measured(folder: Path, model: Model, temperature: float, tokens: int) -> dict:
    prompts = [tuple(model.prompt_ids(Sums().prompt(task))) for task in itertools.islice(Sums().tasks("train"), 256)]
    numerics = numerics_of("cpu", engine="llama.cpp")
    weights: Tensors = list(published(model.path))
    verifier = engine_of(model, "float32", 1, "cpu", "int4")
    config = Path(model.path, "config.json").read_bytes()
    engine = LlamaCppEngine(folder, config, eos_ids=model.eos_ids, max_rows=ROWS)
    engine.load(quantised(weights, "int4"))
    seen, noise, core_s = play(engine, verifier, prompts, temperature, tokens)
    log.info("honest: %s", of(seen, noise))
    about = {"numerics": numerics, "verified_in": ("float32",), "tolerance": bounds.TOLERANCE["float32"] / temperature}
    profile = bounds.calibrate(name_of(numerics), seen[::2], noise=noise, **about)
    found = {"model": model.path, "temperature": temperature} | of(seen, noise)
    found |= {"tokens_per_core_s": round(len(noise) / core_s), "far": profile.far, "liked": profile.liked}
    found["judged"] = {"honest": told(profile, seen[1::2])}
    for name, cheat in CHEATS.items():
        found["judged"][name] = told(
            profile, play(engine, verifier, prompts, temperature, tokens * CHEAT_PART, cheat)[0]
        )
        log.info("%s: %s", name, found["judged"][name])
    for name, made in COARSER.items():
        engine.load([(n, made(t) if is_quantised(n, t) else t) for n, t in weights])
        found["judged"][name] = told(profile, play(engine, verifier, prompts, temperature, tokens * CHEAT_PART)[0])
        log.info("%s: %s", name, found["judged"][name])
    engine.close()
    return found


def of(seen: Sequence[Seen], noise: np.ndarray) -> dict[str, float]:
    """How far honest text is from the verifier's own."""
    margin = np.concatenate([one.margin for one in seen])
    return {
        "tokens": len(margin),
        "flipped": round(sum(map(flips, seen)) / len(margin), 5),
        "mean_margin": round(float(margin.mean()), 5),
        "largest_margin": round(float(margin.max()), 3),
        "noise": round(float(np.sqrt((noise**2).mean())), 4),
        "largest_noise": round(float(np.abs(noise).max()), 3),
    }


def told(profile: Profile, seen: Sequence[Seen]) -> dict[str, float | None]:
    """How often it flips, what a token of it weighs, and after how many the test would eject."""
    tokens, nats = sum(len(one.gap) for one in seen), bounds.growth(profile, seen)
    ejection = round(math.log(1 / ALPHA) / nats) if nats else None
    flipped = sum(map(flips, seen)) / tokens
    return {"tokens": tokens, "flipped": round(flipped, 4), "nats_per_token": round(nats, 4), "ejection": ejection}


if __name__ == "__main__":
    main()
