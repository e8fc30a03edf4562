"""`farflung calibrate`: measure, on a trusted machine, how honest nodes and known cheats look to a validator.

Honest means: the same policy, whatever the batch size; so rollouts are generated at several, none of which is the
verifier's. In bfloat16 each is also replayed in float32, as the confirmation of an ejection does.
"""

import itertools
import logging
import math
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from farflung.trust.evidence import ALPHA, Profile, Seen, calibrate, flips, growth, to_json

log = logging.getLogger(__name__)
BUDGETS = (1, 32, 2, 32, 4, 32, 8)
"""Most tokens of a rollout, in turn: fingerprints of few tokens are the farthest; an odd number of them, so that every
prompt meets every budget."""
PROMPTS = 1024
REPLAYED_AT_LEAST = 16
PARTS = {64: 1.0, 7: 0.25, 1: 0.0625}
"""Rows generated at once, and the share of the tokens that is generated so: few rows are slow."""
CHEAT_PART = 0.25
CHEATS: dict[str, Callable[[Request], Request]] = {
    "unseeded": lambda request: replace(request, seed=secrets.randbits(64)),
    "temperature 0.9": lambda request: replace(request, temperature=0.9 * request.temperature),
    "temperature 1.1": lambda request: replace(request, temperature=1.1 * request.temperature),
}
"""What a profile must still tell from honest work: it widens with the noise that it forgives."""
TOLERANCE = {"float32": 2e-4, "bfloat16": 2e-3}
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
        cheats = {
            cheat: [s for s, _ in _samples(generator, verifiers[:1], asked, max(PARTS), tokens * CHEAT_PART, change)]
            for cheat, change in CHEATS.items()
        }
    profile = calibrate(name, honest, cheats, tolerance=TOLERANCE[dtype])
    profile = msgspec.structs.replace(profile, holds_published=not engine_url)
    if distances:
        profile = msgspec.structs.replace(profile, fingerprint=round(fingerprint.bound(distances), 4))
        log.info("fingerprints farthest=%.4f bound=%.4f", max(distances), profile.fingerprint)
    out.write_bytes(to_json(profile) + b"\n")
    _report(profile, {"honest": honest, **cheats})
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
    change: Callable[[Request], Request] = lambda request: request,
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
        done = [one for one in generator.generate([change(request) for request in requests]) if one is not None]
        seen += sum(len(completion.ids) for completion in done)
        items = [(request, completion.ids) for request, completion in zip(requests, done, strict=True)]
        for verifier in verifiers:
            yield from map(_sample, done, verifier.replay(items))
        if time.monotonic() > said + PROGRESS_S or seen >= tokens:
            said = time.monotonic()
            log.info("generated rows=%d tokens=%d of=%d", rows, seen, tokens)


def _sample(done: Completion, replay: Replay) -> tuple[Seen, float | None]:
    """No distance where the engine makes no fingerprints."""
    assert replay.sketch is not None, "every request here asks for a fingerprint"
    far = fingerprint.distance(done.fingerprint, replay.sketch) if done.fingerprint else None
    return Seen(replay.gap, replay.margin, replay.pick), far


def _report(profile: Profile, played: Mapping[str, Sequence[Seen]]) -> None:
    """What the profile is good for: how often each kind flips, what a token weighs, and how many an ejection takes."""
    for name, samples in played.items():
        tokens, nats = sum(len(one.gap) for one in samples), growth(profile, samples)
        flipped = sum(map(flips, samples)) / tokens
        needed = f"{math.log(1 / ALPHA) / nats:.0f}" if nats else "none suffice"
        log.info("%s tokens=%d flipped=%.4f nats_per_token=%.3f ejection=%s", name, tokens, flipped, nats, needed)
    told = [cheat for cheat in CHEATS if not profile.power.get(cheat)]
    if told:
        log.warning("profile=%s tells nothing of %s on these prompts: this policy is too sure", profile.name, told)
