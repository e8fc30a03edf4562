"""`farflung calibrate`: measure, on a trusted machine, how honest nodes and known cheats look to a validator.

Honest means: the same policy, whatever the batch size and thread count; so the generator's differ from the verifier's.
"""

import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from farflung.engine.base import Request
from farflung.engine.local import LocalEngine
from farflung.envs.sums import Sums
from farflung.protocol.errors import ConfigError
from farflung.tasks.found import Model
from farflung.trust.evidence import Sample, calibrate, to_json

BUDGET = 32
SAMPLES = 4
PROMPTS = 1024
ROWS = (1, 7, 64)
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}


def write_profile(model: str, name: str, out: Path, prompts: Path | None) -> None:
    """Generate, replay, calibrate, write."""
    dtype = "bfloat16" if "bf16" in name else "float32"
    requests = _requests(Model(model), prompts)
    engine = _engine(model, getattr(torch, dtype))
    honest = [sample for rows in ROWS for sample in _replays(engine, requests, rows, is_seeded=True)]
    unseeded = _replays(engine, requests, max(ROWS), is_seeded=False)
    profile = calibrate(name, honest, {"unseeded": unseeded}, tolerance=TOLERANCE[dtype])
    out.write_bytes(to_json(profile) + b"\n")


def _requests(model: Model, prompts: Path | None) -> list[Request]:
    if prompts is None:
        env = Sums()
        texts = [env.prompt(task) for task, _ in zip(env.tasks("train"), range(PROMPTS), strict=False)]
    else:
        texts = prompts.read_text().splitlines()[:PROMPTS]
    if not texts:
        raise ConfigError(f"{prompts} holds no prompts; write one a line")
    ids = [tuple(model.prompt_ids(text)) for text in texts]
    return [Request(prompt, secrets.randbits(64), 1.0, BUDGET) for prompt in ids for _ in range(SAMPLES)]


def _engine(model: str, dtype: torch.dtype) -> LocalEngine:
    from farflung.learner.policy import Policy

    engine = LocalEngine.from_folder(model, dtype=dtype)
    engine.load(Policy.from_pretrained(model).tensors())
    return engine


def _replays(engine: LocalEngine, requests: Sequence[Request], rows: int, *, is_seeded: bool) -> list[Sample]:
    """(gap, margin) of every rollout, generated `rows` at a time and replayed all together."""
    engine.max_rows = rows
    asked = requests[: PROMPTS // 4 if rows == 1 else len(requests)]
    made = asked if is_seeded else [replace(request, seed=secrets.randbits(64)) for request in asked]
    done = [completion for completion in engine.generate(made) if completion is not None]
    seen = engine.replay([(request, item.ids) for request, item in zip(asked, done, strict=True)])
    return [(np.asarray(replay.gap), np.asarray(replay.margin)) for replay in seen]
