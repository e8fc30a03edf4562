"""Trainer: replay every rollout of a batch before its gradient, under the weights that it was leased at.

Audits sample; this does not. Text that its seed does not give, however trusted its node, is caught before it is trained
on. The trainer judges no node: text that trips leaves the batch and is audited in full by a validator.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from farflung.engine.base import Engine, Replay, Request
from farflung.trust.evidence import ODD, Profiles, Seen, is_bad, log_ratios, mean_log_ratio, submission_log_ratios
from farflung.trust.watch import Flips, count_flips


@dataclass(frozen=True, slots=True)
class Suspect:
    """One rollout that the tripwire looks at."""

    rollout: str
    manifest: str
    submission: str
    prompt_ids: tuple[int, ...]
    seed: int
    ids: tuple[int, ...]
    is_audited: bool
    """Whether a validator has replayed it, so that it is no suspect any more."""
    profile: str
    """Numerics profile of its node."""


@dataclass(frozen=True, slots=True)
class Looked:
    """The result of one rollout's replay."""

    rollout: str
    submission: str
    log_ratios: np.ndarray
    """ln LR against every cheat."""
    is_audited: bool
    flips: Flips
    logp: torch.Tensor
    """Of each of its tokens under the weights that it was leased at, float32 (N,)."""


def inspect(
    engine: Engine, suspects: Sequence[Suspect], temperature: float, max_new_tokens: int, profiles: Profiles
) -> list[Looked]:
    """Each rollout, replayed, judged by its node's profile; the engine holds the weights they were leased at."""
    items = [(Request(one.prompt_ids, one.seed, temperature, max_new_tokens), one.ids) for one in suspects]
    return [_looked(one, found, profiles) for one, found in zip(suspects, engine.replay(items), strict=True)]


def _looked(one: Suspect, found: Replay, profiles: Profiles) -> Looked:
    profile = profiles.of(one.profile)
    seen = Seen(found.gap, found.margin, found.pick, found.lead)
    ratios, logp = log_ratios(profile, seen), torch.from_numpy(found.logp.copy())
    return Looked(one.rollout, one.submission, ratios, one.is_audited, count_flips(profile, seen), logp)


def tripped(found: Iterable[tuple[str, np.ndarray]]) -> list[str]:
    """Submissions whose rollouts, together or one of them alone, look more like a cheat's.

    `found` pairs a submission with the ln LR against every cheat of one of its rollouts.
    """
    of: dict[str, list[np.ndarray]] = defaultdict(list)
    for submission, ratios in found:
        of[submission].append(ratios)
    return sorted(name for name, rows in of.items() if _trips(rows) or any(_trips([row]) for row in rows))


def _trips(rows: Sequence[np.ndarray]) -> bool:
    return is_bad(mean_log_ratio(submission_log_ratios(rows)), ODD)
