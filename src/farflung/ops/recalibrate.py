"""`farflung recalibrate`: a numerics profile made anew from a run's audits, for machines whose arithmetic has changed.

What a class of machines sent was replayed by the operator's validators, which passed their canaries, and what they saw
was kept. So no machine of the class is needed. The operator vouches for the nodes; one that flips as the others of its
class do not is left out.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path

import msgspec
import numpy as np
import sqlalchemy as sa

from farflung.audits.verdict import KIND, seen_of
from farflung.config import Config, load_run
from farflung.protocol.errors import ConfigError
from farflung.protocol.identity import Signed, unseal
from farflung.protocol.messages import Evidence
from farflung.protocol.numerics import Dtype, Numerics
from farflung.store.db import Database
from farflung.store.tables import AUDITS, SUBMISSIONS
from farflung.trust.bounds import TOLERANCE, calibrate
from farflung.trust.diagnose import UNSEEDED
from farflung.trust.evidence import (
    ALPHA,
    Profile,
    Profiles,
    Seen,
    log_ratios,
    mean_log_ratio,
    submission_log_ratios,
    to_json,
)
from farflung.trust.machine_noise import calibrated_noise, noise_factor
from farflung.trust.profiles import load_profiles

log = logging.getLogger(__name__)
LEAST_TOKENS, LEAST_NODES = 3_000, 2
MOST_ROLLOUTS = 100
"""Rollouts of which noise is estimated, by how many of their tokens flip."""
MOST_TOKENS = 2_000
"""Tokens within which a profile has to eject a node that ignores its seeds, on average."""
UNLIKE = math.log(1e3)
"""A node with such a likelihood ratio by the others' profile is left out; of the honest one in a thousand is."""
Audits = list[list[Seen]]
"""The replayed rollouts of a node, by audit."""


def recalibrate(folder: Path, name: str, out: Path, nodes: Collection[str] = (), new_name: str = "") -> Profile:
    """Write a profile in place of the one of this name, from audits of these nodes, or of all under it.

    Raises ConfigError where there is too little to go by, or where the nodes flip so much that it would tell nothing.
    """
    config = load_run(folder)
    known = load_profiles(config.model)
    old = _profile(known, name)
    shown = (name, "") if old == known.run else (name,)
    audits, arithmetics = _audits(config, old, shown, nodes)
    kept = alike(old, audits)
    for node in sorted(audits.keys() - kept.keys()):
        log.warning("left out node=%s because=it flips as the others under profile %s do not", node, old.name)
    _refuse_few(old, kept)
    profile = made_of(old, new_name or name, list(kept.values()), arithmetics)
    _refuse_blind(profile, kept)
    profile = msgspec.structs.replace(profile, noise=noise_of(old, list(kept.values())))
    out.write_bytes(to_json(profile) + b"\n")
    return profile


def _profile(known: Profiles, name: str) -> Profile:
    if name not in known.names:
        raise ConfigError(f"the run admits no numerics profile {name!r}; it has {', '.join(known.names)}")
    found = known.of(name)
    if found.quantiser:
        raise ConfigError(
            f"profile {name!r} is of weights in {found.quantiser}: audits do not show whether it would tell fewer "
            "bits; make it anew with `farflung calibrate --quantiser`"
        )
    return found


def _audits(
    config: Config, profile: Profile, shown: Collection[str], nodes: Collection[str]
) -> tuple[dict[str, Audits], tuple[Dtype, ...]]:
    """Routine audits of these nodes' work under a profile, by node, and the arithmetics that verifiers computed in.

    `shown` are the profile's names in submissions: a node that picks none has the run's own.
    """
    sent = sa.and_(SUBMISSIONS.c.submission == AUDITS.c.submission, SUBMISSIONS.c.profile.in_(shown))
    drawn = sa.and_(AUDITS.c.run == config.run.name, AUDITS.c.kind == "draw", AUDITS.c.evidence.is_not(None))
    query = sa.select(AUDITS.c.node, AUDITS.c.evidence).join(SUBMISSIONS, sent).where(drawn)
    found: dict[str, Audits] = defaultdict(list)
    arithmetics = set[Dtype]()
    database = Database(config.database_url)
    try:
        with database.engine.connect() as connection:
            for node, kept in connection.execute(query.where(AUDITS.c.node.in_(nodes)) if nodes else query):
                evidence = unseal(msgspec.msgpack.decode(kept, type=Signed), KIND, Evidence)
                arithmetics.add(evidence.arithmetic)
                found[node].append([seen_of(one) for one in evidence.rollouts])
    finally:
        database.close()
    return dict(found), tuple(one for one in profile.verified_in if one in arithmetics)


def alike(old: Profile, audits: Mapping[str, Audits]) -> dict[str, Audits]:
    """The nodes that a profile made of all others forgives."""
    if len(audits) < LEAST_NODES:
        return dict(audits)
    others = {node: [audits[one] for one in audits if one != node] for node in audits}
    return {node: own for node, own in audits.items() if _fits(old, own, others[node])}


def _fits(old: Profile, own: Audits, others: Sequence[Audits]) -> bool:
    profile = _calibrated(old, old.name, _rollouts(others), old.verified_in)
    ratios = [submission_log_ratios([log_ratios(profile, one) for one in audit]) for audit in own]
    return sum(map(mean_log_ratio, ratios)) < UNLIKE


def made_of(old: Profile, name: str, audits: Sequence[Audits], arithmetics: Sequence[Dtype]) -> Profile:
    """A profile of the same numerics and scope as another one, of what these nodes' rollouts show."""
    honest = _rollouts(audits)
    return _calibrated(old, name, honest, arithmetics, {UNSEEDED: [unseeded(*one) for one in enumerate(honest)]})


def _rollouts(audits: Sequence[Audits]) -> list[Seen]:
    return list(chain.from_iterable(chain.from_iterable(audits)))


def _calibrated(
    old: Profile,
    name: str,
    honest: Sequence[Seen],
    arithmetics: Sequence[Dtype],
    cheats: Mapping[str, Sequence[Seen]] | None = None,
) -> Profile:
    temperature = old.scope.temperature if old.scope else 1.0
    found = calibrate(
        name,
        honest,
        cheats,
        numerics=Numerics(**old.fields),
        verified_in=arithmetics or old.verified_in,
        tolerance=TOLERANCE[old.arithmetic] / temperature,
        scope=old.scope,
    )
    return msgspec.structs.replace(found, holds_published=old.holds_published)


def noise_of(old: Profile, audits: Sequence[Audits]) -> float:
    """What log-probabilities of such nodes are off by, in nats, as far as flips tell: evidence has no others."""
    own = max(1, MOST_ROLLOUTS // len(audits))
    seen = [one for of_node in audits for one in list(chain.from_iterable(of_node))[:own]]
    return max(old.noise, calibrated_noise(old) * noise_factor(old, seen))


def unseeded(seed: int, seen: Seen) -> Seen:
    """The same positions, had the node drawn with noise of its own: another token with probability 1 - pick."""
    is_other = np.random.default_rng(seed).random(len(seen.pick)) > seen.pick
    return seen._replace(margin=np.where(is_other, seen.gap, 0.0))


def _refuse_few(old: Profile, kept: Mapping[str, Audits]) -> None:
    tokens = sum(len(one.gap) for own in kept.values() for audit in own for one in audit)
    if len(kept) < LEAST_NODES or tokens < LEAST_TOKENS:
        raise ConfigError(
            f"{tokens:,} audited tokens of {len(kept)} nodes under profile {old.name!r} are too few to calibrate on: "
            f"{LEAST_TOKENS:,} of {LEAST_NODES} nodes are needed; have more of their work audited (trust.audit_floor)"
        )


def _refuse_blind(profile: Profile, kept: Mapping[str, Audits]) -> None:
    nats = profile.power[UNSEEDED]
    tokens = profile.honest.tokens
    log.info("profile=%s nodes=%d tokens=%d nats_per_unseeded_token=%.3g", profile.name, len(kept), tokens, nats)
    if nats * MOST_TOKENS < math.log(1 / ALPHA):
        raise ConfigError(
            f"these {len(kept)} nodes flip so much that profile {profile.name!r} would not tell a node that ignores "
            f"its seeds within {MOST_TOKENS:,} tokens ({nats:.1e} nats a token): they cheat, or compute wrongly"
        )
