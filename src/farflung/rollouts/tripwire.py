"""Trainer: replay every rollout of a batch before its gradient, under the weights that it was leased at.

Audits sample; this does not. Text that its seed does not give, however trusted its node, is caught before it is trained
on. The trainer judges nobody: what trips leaves the batch and is audited in full by a validator.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from farflung.engine.base import Engine, Request
from farflung.rollouts.batch import Suspect
from farflung.trust.evidence import ODD, Profile, Seen, is_bad, log_ratios, mean_log_ratio, submission_log_ratios


def look(
    engine: Engine, suspects: Sequence[Suspect], temperature: float, budget: int, profile: Profile
) -> list[tuple[str, np.ndarray]]:
    """(submission, ln LR against every cheat) of each rollout; the engine holds the weights they were leased at."""
    items = [(Request(one.prompt_ids, one.seed, temperature, budget), one.ids) for one in suspects]
    seen = (Seen(replay.gap, replay.margin, replay.pick) for replay in engine.replay(items))
    return [(one.submission, log_ratios(profile, found)) for one, found in zip(suspects, seen, strict=True)]


def tripped(found: Iterable[tuple[str, np.ndarray]]) -> list[str]:
    """Submissions whose rollouts in this batch, together or one of them alone, look more like a cheat's."""
    of: dict[str, list[np.ndarray]] = defaultdict(list)
    for submission, ratios in found:
        of[submission].append(ratios)
    return sorted(name for name, rows in of.items() if _trips(rows) or any(_trips([row]) for row in rows))


def _trips(rows: Sequence[np.ndarray]) -> bool:
    return is_bad(mean_log_ratio(submission_log_ratios(rows)), ODD)
