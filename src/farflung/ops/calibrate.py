"""`farflung calibrate`: measure, on a trusted machine, how honest nodes and known cheats look to a validator.

Honest means: the same policy, whatever the batch size; so rollouts are generated at several, none of which is the
verifier's. In bfloat16 each is also replayed in float32, as the confirmation of an ejection does.
"""

import itertools
import logging
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import torch

from farflung.config import load
from farflung.engine.base import Completion, Replay, Request
from farflung.engine.local import LocalEngine
from farflung.engine.vllm import VllmEngine
from farflung.envs.base import Env
from farflung.envs.load import load_env
from farflung.envs.sums import Sums
from farflung.protocol.errors import ConfigError
from farflung.tasks.found import Model
from farflung.trust import fingerprint
from farflung.trust.evidence import Profile, Seen, calibrate, flips, growth, to_json

log = logging.getLogger(__name__)
BUDGETS = (1, 32, 2, 32, 4, 32, 8)
"""Most tokens of a rollout, in turn: fingerprints of few tokens are the farthest; an odd number of them, so that every
prompt meets every budget."""
PROMPTS = 1024
REPLAYED_AT_LEAST = 16
PARTS = {64: 1.0, 7: 0.25, 1: 0.0625}
"""Rows generated at once, and the share of the tokens that is generated so: few rows are slow."""
UNSEEDED_PART = 0.5
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
VERIFIERS = {"float32": ("float32",), "bfloat16": ("bfloat16", "float32")}
PROGRESS_S = 10.0


def write_profile(
    model: str, name: str, out: Path, prompts: Path | None, *, tokens: int, threads: int, engine_url: str = ""
) -> Profile:
    """Generate, replay, calibrate, write. `tokens` are generated at the largest batch, parts of it at smaller ones.

    With the URL of a vLLM server it is that which generates; it no longer holds the values that were published.
    """
    dtype = "bfloat16" if "bf16" in name else "float32"
    asked = _prompt_ids(Model(model), prompts)
    engines = {name: _engine(model, name, threads) for name in VERIFIERS[dtype]}
    with tempfile.TemporaryDirectory() as folder:
        generator = _served(model, engine_url, Path(folder)) if engine_url else engines[dtype]
        verifiers = list(engines.values())
        played = [s for rows, part in PARTS.items() for s in _samples(generator, verifiers, asked, rows, tokens * part)]
        honest, distances = [seen for seen, _ in played], [far for _, far in played if far is not None]
        others = _samples(generator, verifiers[:1], asked, max(PARTS), tokens * UNSEEDED_PART, is_seeded=False)
        unseeded = [seen for seen, _ in others]
    profile = calibrate(name, honest, {"unseeded": unseeded}, tolerance=TOLERANCE[dtype])
    profile = msgspec.structs.replace(profile, holds_published=not engine_url)
    if distances:
        profile = msgspec.structs.replace(profile, fingerprint=round(fingerprint.bound(distances), 4))
        log.info("fingerprints farthest=%.4f bound=%.4f", max(distances), profile.fingerprint)
    out.write_bytes(to_json(profile) + b"\n")
    _report(profile, honest, unseeded)
    return profile


def _prompt_ids(model: Model, prompts: Path | None) -> list[tuple[int, ...]]:
    """Prompts from a text file, one a line; from the environment of a run's TOML; or the demo's sums."""
    if prompts is not None and prompts.suffix != ".toml":
        texts = prompts.read_text().splitlines()[:PROMPTS]
    else:
        env = _env(prompts)
        texts = [env.prompt(task) for task in itertools.islice(env.tasks("train"), PROMPTS)]
    if not texts:
        raise ConfigError(f"{prompts} holds no prompts; write one a line")
    return [tuple(model.prompt_ids(text)) for text in texts]


def _env(config: Path | None) -> Env:
    if config is None:
        return Sums()
    env = load(config).env
    return load_env(env.name, env.args)


def _engine(model: str, dtype: str, threads: int) -> LocalEngine:
    from farflung.learner.policy import Policy

    found = Model(model)
    engine = LocalEngine.from_folder(model, dtype=getattr(torch, dtype), threads=threads, eos_ids=found.eos_ids)
    # Weights are published in bfloat16 whatever the arithmetic.
    engine.load(Policy.from_pretrained(model).tensors())
    return engine


def _served(model: str, url: str, folder: Path) -> VllmEngine:
    from farflung.learner.policy import Policy

    engine = VllmEngine(url, folder, eos_ids=Model(model).eos_ids)
    engine.load(Policy.from_pretrained(model).tensors())
    return engine


def _samples(
    generator: LocalEngine | VllmEngine,
    verifiers: Sequence[LocalEngine],
    prompts: Sequence[tuple[int, ...]],
    rows: int,
    tokens: float,
    *,
    is_seeded: bool = True,
) -> Iterator[tuple[Seen, float | None]]:
    """What each verifier sees of each rollout, and how far its own fingerprint is from the one that was generated.

    Generated `rows` at a time, replayed many at a time.
    """
    generator.max_rows = rows
    chunk, nonce = max(rows, REPLAYED_AT_LEAST), secrets.token_hex(32)
    endless = zip(itertools.cycle(prompts), itertools.cycle(BUDGETS), strict=False)
    seen, said = 0, time.monotonic()
    while seen < tokens:
        requests = [
            Request(prompt, secrets.randbits(64), 1.0, budget, nonce)
            for prompt, budget in itertools.islice(endless, chunk)
        ]
        made = requests if is_seeded else [replace(request, seed=secrets.randbits(64)) for request in requests]
        done = [completion for completion in generator.generate(made) if completion is not None]
        seen += sum(len(completion.ids) for completion in done)
        items = [(request, completion.ids) for request, completion in zip(requests, done, strict=True)]
        for verifier in verifiers:
            yield from map(_sample, done, verifier.replay(items))
        if time.monotonic() > said + PROGRESS_S or seen >= tokens:
            said = time.monotonic()
            log.info("generated rows=%d is_seeded=%s tokens=%d of=%d", rows, is_seeded, seen, tokens)


def _sample(done: Completion, replay: Replay) -> tuple[Seen, float | None]:
    """No distance where the engine makes no fingerprints."""
    assert replay.sketch is not None, "every request here asks for a fingerprint"
    far = fingerprint.distance(done.fingerprint, replay.sketch) if done.fingerprint else None
    return Seen(replay.gap, replay.margin, replay.pick), far


def _report(profile: Profile, honest: Sequence[Seen], unseeded: Sequence[Seen]) -> None:
    """What the profile is good for: how often the honest flip, and what a token of each kind weighs as evidence."""
    for name, samples in (("honest", honest), ("unseeded", unseeded)):
        tokens = sum(len(one.gap) for one in samples)
        flipped = sum(map(flips, samples)) / tokens
        log.info("%s tokens=%d flipped=%.4f nats_per_token=%.3f", name, tokens, flipped, growth(profile, samples))
