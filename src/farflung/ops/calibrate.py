"""`farflung calibrate`: measure, on a trusted machine, how honest nodes and known cheats look to a validator.

Honest means the same policy, however it is computed: rows at once, threads, and where the processor can be told to,
older instructions, none of which is the verifier's. Generated token by token, replayed in one prefill. In bfloat16 each
is also replayed in float32. Temperature, length of completions and prompts are the run's: noise of scores grows as
1 ÷ temperature, and a profile says what it is for.
"""

import contextlib
import itertools
import logging
import math
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
import torch

from farflung.config import Config, load
from farflung.engine.arithmetic import BITS, HOLDS, QUANTISED, Own
from farflung.engine.base import Completion, Replay, Request
from farflung.engine.fit import Text, cache_bytes
from farflung.engine.llama_cpp import LlamaCppEngine, own_llama_cpp
from farflung.engine.local import LocalEngine
from farflung.engine.of_node import mlx_engine, mlx_numerics
from farflung.engine.vllm import VllmEngine
from farflung.engine.vllm_answers import server_numerics
from farflung.engine.vllm_process import HOME, ServerSize, serving
from farflung.envs.base import Env
from farflung.envs.load import load_env
from farflung.envs.sums import Sums
from farflung.launch.logs import start_logging
from farflung.launch.restarts import REFUSED
from farflung.numerics.devices import pick
from farflung.numerics.quantise import quantised
from farflung.ops.older_engine import OlderEngine
from farflung.protocol.errors import ConfigError
from farflung.protocol.numerics import COARSER, Dtype, Numerics, Quantiser
from farflung.protocol.seeds import SEED_BITS
from farflung.protocol.shown import one_line
from farflung.tasks.create_run import Model
from farflung.tasks.model_check import refuse_long
from farflung.trust.bounds import TOLERANCE, calibrate, growth
from farflung.trust.evidence import ALPHA, WEIGHTS_OF, Profile, Scope, Seen, flips, to_json
from farflung.trust.profiles import load_profile

if TYPE_CHECKING:
    from farflung.engine.mlx import MlxEngine

log = logging.getLogger(__name__)
SHORT = (1, 2, 4, 8)
"""Completions of so few tokens are among the others, for runs whose answers are short."""
PROMPTS = 1024
REPLAYED_AT_LEAST = 16
CHEAT_PART = 0.25
CHEATS: dict[str, Callable[[Request], Request]] = {
    "unseeded": lambda request: replace(request, seed=secrets.randbits(SEED_BITS)),
    "temperature 0.9": lambda request: replace(request, temperature=0.9 * request.temperature),
    "temperature 1.1": lambda request: replace(request, temperature=1.1 * request.temperature),
}
"""Cheats that a profile must still tell from honest work: it widens with the noise that it forgives."""
VERIFIERS: dict[str, tuple[Dtype, ...]] = {
    "float32": ("float32",),
    "bfloat16": ("bfloat16", "float32"),
    "float16": ("float16", "float32"),
    "fp8": ("bfloat16", "float32"),
}
"""Arithmetics of the verifiers of each: the cheaper in front, then one for second opinions."""
SHORT_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
PROGRESS_S = 3.0


class Kind(NamedTuple):
    """One way to generate honestly, and the share of the tokens that is generated so: few rows are slow."""

    rows: int
    threads: int
    is_older: bool
    share: float


KINDS = (
    Kind(64, 1, False, 1.0),
    Kind(64, 2, False, 0.25),
    Kind(7, 1, False, 0.25),
    Kind(1, 1, False, 0.0625),
    Kind(16, 1, True, 0.0625),
)


@dataclass(frozen=True)
class Conditions:
    """Whose generation is measured: the model, its prompts, at which temperature, up to how many tokens."""

    model: Model
    prompts: Sequence[tuple[int, ...]]
    temperature: float
    max_new_tokens: int

    @property
    def scope(self) -> Scope:
        """The runs that a profile made under these conditions is for."""
        return Scope(self.model.digest, self.temperature, self.max_new_tokens)

    @property
    def budgets(self) -> tuple[int, ...]:
        """Most tokens of a rollout, in turn; an odd number of them, so that every prompt meets every limit."""
        short = [size for size in SHORT if size < self.max_new_tokens]
        found = [self.max_new_tokens, *(size for one in short for size in (one, self.max_new_tokens))]
        return tuple(found if len(found) % 2 else [*found, self.max_new_tokens])


class Played(NamedTuple):
    """One honest rollout as one verifier saw it."""

    seen: Seen
    noise: np.ndarray
    """By how much the generator's log-probability of each token differs from the verifier's."""


def write_profile(
    model: str,
    name: str,
    out: Path,
    prompts: Path | None,
    *,
    tokens: int,
    threads: int,
    device: str = "auto",
    arithmetic: str = "",
    quantiser: Quantiser = "",
    engine: str = "torch",
    engine_url: str = "",
    temperature: float = 1.0,
    max_new_tokens: int = 32,
) -> Profile:
    """Generate, replay, calibrate, write. `tokens` are generated at the largest batch, parts of it in other ways.

    Empty for name and arithmetic is what follows from the device, or what a vLLM server says of itself.

    `prompts` may be the TOML of a run: then temperature and max_new_tokens are that run's. With the URL of a vLLM
    server that generates; it no longer holds the values that were published.
    """
    if prompts is not None and prompts.suffix == ".toml":
        generate = load(prompts).generate
        temperature, max_new_tokens = generate.temperature, generate.max_new_tokens
    found = Model(model)
    under = Conditions(found, _prompt_ids(found, prompts), temperature, max_new_tokens)
    where = pick(device)
    with contextlib.ExitStack() as stack:
        if engine == "vllm" and not engine_url:
            engine_url = stack.enter_context(_own_server(under, where, threads))
        kind = device if engine == "llama.cpp" else where.type
        numerics = numerics_of(kind, arithmetic, quantiser, engine_url, engine=engine)
        options = {"tokens": tokens, "threads": threads, "device": where, "engine_url": engine_url}
        profile = make_profile(under, name or name_of(numerics), numerics, **options)
    out.write_bytes(to_json(profile) + b"\n")
    return profile


@contextlib.contextmanager
def _own_server(under: Conditions, device: torch.device, threads: int) -> Iterator[str]:
    """The URL of a vLLM server of this machine's own, as large as calibration needs it."""
    config, rows = Path(under.model.path, "config.json").read_bytes(), KINDS[0].rows
    text = Text(max(map(len, under.prompts)), under.max_new_tokens)
    size = ServerSize(device, text.tokens, rows, cache_bytes(config, torch.bfloat16, text, rows), 0.0, threads)
    with tempfile.TemporaryDirectory() as folder, serving(HOME, Path(folder), config, size) as url:
        yield url


def numerics_of(
    device: str, arithmetic: str = "", quantiser: str = "", engine_url: str = "", *, engine: str = "torch"
) -> Numerics:
    """The numerics that are meant. Raises ConfigError for what an engine cannot do, or a server says it does not."""
    own = server_numerics(engine_url) if engine_url else Own("torch", device)
    own = mlx_numerics(torch.device(device)) if engine == "mlx" else own
    own = own_llama_cpp(device) if engine == "llama.cpp" else own
    quantiser = quantiser or HOLDS.get(own.engine, ("",))[0]
    device, natural = own.device or device, own.arithmetic or ("float32" if device == "cpu" else "bfloat16")
    fields = {"engine": own.engine, "device": device, "arithmetic": arithmetic or natural}
    if fields["arithmetic"] not in BITS:
        raise ConfigError(f"there is no arithmetic {arithmetic!r}; choose one of {', '.join(BITS)}")
    bits = QUANTISED[quantiser] or own.bits or BITS[fields["arithmetic"]]
    found = msgspec.convert(fields | {"bits": bits, "quantiser": quantiser}, Numerics)
    if not own.fits(found):
        raise ConfigError(
            f"asked to measure {found.text}, but this is {own.text}; leave out --arithmetic and --quantiser"
        )
    return found


def name_of(numerics: Numerics) -> str:
    """A name for a profile, such as torch-cuda-bf16."""
    short = SHORT_NAMES.get(numerics.arithmetic, numerics.arithmetic)
    return f"{numerics.engine}-{numerics.device}-{short}" + (f"-{numerics.quantiser}" if numerics.quantiser else "")


def profile_of_run(config: Config, name: str, tokens: int) -> Profile:
    """A profile for just this run in place of one that does not fit, made on the machine that is to trust it.

    In seconds, so of few kinds. Its arithmetic is that of the one named, its device that of the run's own nodes.
    """
    device = pick(config.worker.device)
    numerics = numerics_of(device.type, load_profile(name).arithmetic, load_profile(name).quantiser)
    model, env = Model(config.model.path), load_env(config.env.name, config.env.args)
    prompts = [env.prompt(task) for task in itertools.islice(env.tasks("train"), PROMPTS)]
    asked = [tuple(model.prompt_ids(prompt)) for prompt in prompts]
    refuse_long(model, map(len, asked), config.generate.max_new_tokens)
    under = Conditions(model, asked, config.generate.temperature, config.generate.max_new_tokens)
    options = {"tokens": tokens, "threads": 1, "device": device, "kinds": KINDS[:3], "cheats": ()}
    return make_profile(under, name_of(numerics), numerics, **options)


def make_profile(
    under: Conditions,
    name: str,
    numerics: Numerics,
    *,
    tokens: int,
    threads: int,
    device: torch.device | str = "cpu",
    engine_url: str = "",
    kinds: Sequence[Kind] = KINDS,
    cheats: Sequence[str] = tuple(CHEATS),
) -> Profile:
    """The profile of one kind of arithmetic under some conditions."""
    arithmetic, quantiser, verified_in = numerics.arithmetic, numerics.quantiser, VERIFIERS[numerics.arithmetic]
    verifiers = [engine_of(under.model, kind, threads, device, quantiser) for kind in verified_in]
    kinds = [kind for kind in kinds if not kind.is_older or (numerics.engine, numerics.device) == ("torch", "cpu")]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        generator = verifiers[0]
        if engine_url:
            generator = _served(under.model, engine_url, Path(folder), quantiser)
        elif numerics.engine == "mlx":
            generator = _in_mlx(under.model, arithmetic, device, quantiser)
        elif numerics.engine == "llama.cpp":
            generator = stack.enter_context(_in_llama_cpp(under.model, numerics.device, Path(folder), threads))
        of_kind = [
            (OlderEngine(under.model.path, arithmetic, quantiser) if kind.is_older else generator, kind)
            for kind in kinds
        ]
        honest = [
            one for made_by, kind in of_kind for one in _play(made_by, verifiers, under, kind, tokens * kind.share)
        ]
        tried = {
            cheat: [
                one.seen for one in _play(generator, verifiers[:1], under, KINDS[0], tokens * CHEAT_PART, CHEATS[cheat])
            ]
            for cheat in cheats
        }
        for kind in COARSER[quantiser] if quantiser and cheats else ():
            is_own = generator is verifiers[0]
            other = engine_of(under.model, arithmetic, threads, device) if is_own else generator
            other.load(quantised(published(under.model.path), kind))
            of_it = _play(other, verifiers[:1], under, KINDS[0], tokens * CHEAT_PART)
            tried[f"{WEIGHTS_OF}{kind}"] = [one.seen for one in of_it]
    seen, noise = [one.seen for one in honest], np.concatenate([one.noise for one in honest])
    about = {"numerics": numerics, "verified_in": verified_in, "scope": under.scope}
    profile = calibrate(name, seen, tried, noise=noise, tolerance=TOLERANCE[arithmetic] / under.temperature, **about)
    profile = msgspec.structs.replace(profile, holds_published=bool(quantiser) or not engine_url)
    _report(profile, {"honest": seen, **tried})
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


def engine_of(
    model: Model, dtype: str, threads: int, device: torch.device | str = "cpu", quantiser: Quantiser = ""
) -> LocalEngine:
    """The model with its weights as they are published, quantised if asked."""
    engine = LocalEngine.from_folder(
        model.path, dtype=getattr(torch, dtype), threads=threads, eos_ids=model.eos_ids, device=device
    )
    engine.load(quantised(published(model.path), quantiser))
    return engine


def published(model: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights as they are published, in bfloat16 whatever the arithmetic."""
    from farflung.learner.policy import Policy

    return Policy.from_pretrained(model).tensors()


def _served(model: Model, url: str, folder: Path, quantiser: Quantiser) -> VllmEngine:
    engine = VllmEngine(url, folder, eos_ids=model.eos_ids, vocab=model.vocab)
    engine.load(quantised(published(model.path), quantiser))
    return engine


def _in_mlx(model: Model, dtype: str, device: torch.device | str, quantiser: Quantiser) -> "MlxEngine":
    engine = mlx_engine(model.path, dtype=getattr(torch, dtype), eos_ids=model.eos_ids, device=device)
    engine.load(quantised(published(model.path), quantiser))
    return engine


@contextlib.contextmanager
def _in_llama_cpp(model: Model, device: str, folder: Path, threads: int) -> Iterator[LlamaCppEngine]:
    config, where = Path(model.path, "config.json").read_bytes(), "cpu" if device == "cpu" else "auto"
    engine = LlamaCppEngine(folder, config, eos_ids=model.eos_ids, device=where, threads=threads)
    engine.load(quantised(published(model.path), "int4"))
    try:
        yield engine
    finally:
        engine.close()


def _play(
    generator: "LocalEngine | LlamaCppEngine | VllmEngine | OlderEngine | MlxEngine",
    verifiers: Sequence[LocalEngine],
    under: Conditions,
    kind: Kind,
    tokens: float,
    change: Callable[[Request], Request] = lambda request: request,
) -> Iterator[Played]:
    """Each verifier's view of each rollout. Generated as `kind` says, replayed many at a time."""
    generator.max_rows = kind.rows
    # A process is slow to start, so an older one is asked for all at once.
    at_once = int(2 * tokens / under.max_new_tokens) if kind.is_older else REPLAYED_AT_LEAST
    chunk = max(kind.rows, at_once)
    endless = zip(itertools.cycle(under.prompts), itertools.cycle(under.budgets), strict=False)
    seen, said, threads = 0, time.monotonic(), torch.get_num_threads()
    while seen < tokens:
        requests = [
            Request(prompt, secrets.randbits(SEED_BITS), under.temperature, max_new_tokens)
            for prompt, max_new_tokens in itertools.islice(endless, chunk)
        ]
        torch.set_num_threads(kind.threads)
        done = [one for one in generator.generate([change(request) for request in requests]) if one is not None]
        torch.set_num_threads(threads)
        seen += sum(len(completion.ids) for completion in done)
        items = [(request, completion.ids) for request, completion in zip(requests, done, strict=True)]
        for verifier in verifiers:
            yield from map(_played, done, verifier.replay(items))
        if time.monotonic() > said + PROGRESS_S or seen >= tokens:
            said = time.monotonic()
            log.info("generated rows=%d threads=%d tokens=%d of=%d", kind.rows, kind.threads, seen, tokens)


def _played(done: Completion, replay: Replay) -> Played:
    seen = Seen(replay.gap, replay.margin, replay.pick, replay.lead)
    return Played(seen, np.array(done.logp) - replay.logp)


def _report(profile: Profile, played: Mapping[str, Sequence[Seen]]) -> None:
    """The strength of the profile: how often each kind flips, what a token weighs, and how many an ejection takes."""
    for name, samples in played.items():
        tokens, nats = sum(len(one.gap) for one in samples), growth(profile, samples)
        flipped = sum(map(flips, samples)) / tokens
        needed = f"{math.log(1 / ALPHA) / nats:.0f}" if nats else "none suffice"
        log.info("%s tokens=%d flipped=%.4f nats_per_token=%.3f ejection=%s", name, tokens, flipped, nats, needed)
    noise, choice = profile.noise, profile.choice_bits
    log.info("margin=%g noise=%.3g far=%.3g choice_bits_per_token=%.3g", profile.margin, noise, profile.far, choice)
    log.info("liked=%.3g", profile.liked)
    untold = [cheat for cheat in CHEATS if not profile.power.get(cheat)]
    if untold:
        log.warning("profile=%s tells nothing of %s on these prompts: this policy is too sure", profile.name, untold)


def _main(config: str, name: str, out: str, tokens: str) -> None:
    """Make the profile of a run before it starts, in a process of its own."""
    start_logging()
    try:
        settings = load(Path(config), environ={})
        Path(out).write_bytes(to_json(profile_of_run(settings, name, int(tokens))) + b"\n")
    except ConfigError as error:
        sys.stderr.write(f"{one_line(str(error))}\n")
        sys.exit(REFUSED)


if __name__ == "__main__":
    _main(*sys.argv[1:])
