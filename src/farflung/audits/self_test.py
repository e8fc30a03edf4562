"""Worker and doctor: try this machine's arithmetic on texts that the trainer generated with the same weights.

The trainer makes a few rollouts with every EVERY-th version from seeds that anybody may know: they derive from no
secret, so they give nothing away and can be told at once.
"""

import asyncio
import hashlib
import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from farflung.engine.base import Engine, Request
from farflung.net.session import Session
from farflung.protocol import seeds, wire
from farflung.protocol.errors import ConfigError, FarflungError, NotFound
from farflung.protocol.messages import Canary, SelfTest
from farflung.store.run import RunContext
from farflung.trust.evidence import Profile, Seen, from_json
from farflung.trust.machine_noise import calibrated_noise, compared, expectation, noise_factor, scale_of

log = logging.getLogger(__name__)
EVERY = 4
"""Steps between versions that come with a self-test."""
TOKENS = 32
"""Most tokens of one of its rollouts."""


class Tried(NamedTuple):
    """The result of a self-test, by one profile."""

    factor: float
    """Noise as a multiple of what the profile was calibrated on."""
    is_forgiven: bool
    """Whether the profile's margin is as wide."""
    tokens: int
    text: str
    seen: tuple[Seen, ...] = ()
    noise: float = 0.0
    """What it is of, for another profile to judge: tokens, and by what log-probabilities differ."""


# --- coordinator -----------------------------------------------------------------------------------------------------


def requests(run_ctx: RunContext, step: int, prompts: Sequence[bytes]) -> list[Canary]:
    """The requests for the trainer to generate for it."""
    max_new_tokens = min(TOKENS, run_ctx.config.generate.max_new_tokens)
    return [
        Canary(prompt_ids=ids, seed=_number(run_ctx, step, "seed", i), max_new_tokens=max_new_tokens)
        for i, ids in enumerate(prompts)
    ]


def tasks(run_ctx: RunContext, step: int) -> list[str]:
    """The tasks whose prompts it has; none for most steps."""
    count = run_ctx.config.trust.self_test if step % EVERY == 0 else 0
    return [run_ctx.tasks[_number(run_ctx, step, "task", i) % len(run_ctx.tasks)][0] for i in range(count)]


def _number(run_ctx: RunContext, step: int, label: str, i: int) -> int:
    public = hashlib.sha256(f"farflung self-test {run_ctx.run}".encode()).digest()
    return seeds.number(seeds.derive(public, f"self-test {label}", step, i))


# --- node ------------------------------------------------------------------------------------------------------------


async def fetch(session: Session, manifest: str) -> SelfTest | None:
    """The self-test of a version, if it has one."""
    try:
        return await session.client.get(session.path(f"manifests/{manifest}/self-test"), SelfTest)
    except NotFound:
        return None


def profile_in(session: Session, test: SelfTest, name: str) -> Profile | None:
    """A profile that comes with a self-test, if its bytes are those of the run's sealed descriptor.

    None for one of quantised weights: a self-test is made with the weights as they are published.
    """
    data, sealed = test.profiles.get(name, b""), session.info.profiles.get(name)
    if sealed is None or hashlib.sha256(data).hexdigest() != sealed.digest:
        log.warning("no self-test because=the run's descriptor does not name the profile %r that comes with it", name)
        return None
    return None if sealed.quantiser else from_json(data)


def attempt(engine: Engine, test: SelfTest, profile: Profile) -> Tried | None:
    """Generate what was generated before and compare; None for an engine that cannot tell gaps."""
    asked = [
        Request(tuple(wire.unpack_ids(one.prompt_ids).tolist()), one.seed, test.temperature, one.max_new_tokens)
        for one in test.items
    ]
    known = [wire.unpack_ids(one.ids).tolist() for one in test.items]
    try:
        gaps = engine.replay(list(zip(asked, known, strict=True)))
    except ConfigError:
        return None
    made = engine.generate(asked)
    told = [wire.unpack_floats(one.logp) for one in test.items]
    apart = [gap.logp - logp for gap, logp in zip(gaps, told, strict=True) if len(logp) == len(gap.logp)]
    seen: list[Seen] = []
    for done, ids, gap in zip(made, known, gaps, strict=True):
        own = [] if done is None else list(done.ids)
        seen.append(compared(own, ids, np.asarray(gap.gap), np.asarray(gap.pick)))
    return judged(seen, scale_of(apart), profile)


def judged(seen: Sequence[Seen], noise: float, profile: Profile) -> Tried:
    """What a profile says of a machine whose tokens differ so, and whose log-probabilities are off by so much."""
    factor = max(noise_factor(profile, seen), noise / calibrated_noise(profile))
    tokens = sum(len(one.gap) for one in seen)
    return Tried(factor, factor <= profile.margin, tokens, expectation(factor, profile), tuple(seen), noise)


def nearest(session: Session, test: SelfTest, own: str, tried: Tried) -> str:
    """The admitted profile of the same engine and device that forgives the least of those that forgive this machine;
    empty for none.
    """
    mine = session.info.profiles[own]
    alike = [
        name
        for name, one in session.info.profiles.items()
        if name != own and (one.engine, one.device) == (mine.engine, mine.device)
    ]
    found = {name: profile for name in alike if (profile := profile_in(session, test, name)) is not None}
    forgiving = [name for name, profile in found.items() if judged(tried.seen, tried.noise, profile).is_forgiven]
    return min(forgiving, key=lambda name: found[name].noise, default="")


async def fetch_or_none(session: Session, manifest: str) -> SelfTest | None:
    """The same, and none where the coordinator cannot be asked now: a test is no reason not to work."""
    try:
        return await fetch(session, manifest)
    except FarflungError as error:
        log.warning("no self-test because=%s", error)
        return None


async def elsewhere(
    session: Session, engine: Engine, test: SelfTest, own: str, profile: Profile, *, is_ignored: bool
) -> str:
    """Try an engine: the profile to be judged by instead of its own, if any.

    Raises ConfigError where its noise is not forgiven under any that is admitted.
    """
    tried = await asyncio.to_thread(_attempt, session, engine, test, profile)
    if tried is None:
        log.info("no self-test because=%s cannot tell gaps", profile.engine)
        return ""
    log.info("self-test step=%d tokens=%d %s", test.step, tried.tokens, tried.text)
    if tried.is_forgiven or is_ignored:
        return ""
    if other := nearest(session, test, own, tried):
        return other
    raise ConfigError(f"{tried.text}, or work all the same with --ignore-self-test")


def _attempt(session: Session, engine: Engine, test: SelfTest, profile: Profile) -> Tried | None:
    with session.stats.working("proof"):
        return attempt(engine, test, profile)
