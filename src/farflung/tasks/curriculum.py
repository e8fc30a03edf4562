"""Curriculum: which tasks a step should draw, as a pure function of what earlier steps saw. No SQL, no clock, no torch.

Of each task a Beta posterior of its pass rate is kept: what its groups earned, which fades while the policy goes on
without it. A pass rate p is drawn from each posterior (Thompson 1933), and the tasks whose draws promise the most
variance of reward, p (1 - p), come first; one that was just taken rests, or a few would come at every step. A task that
no step has tried has the prior, the mean over all that were; of those few are candidates, or the luckiest of a hundred
thousand draws would always win. One place in `EXPLORE`, which one differs from step to step, goes to the next task of
the step's shuffled order whatever is known of it: so none is starved.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from farflung.learner.difficulty import Count, fade
from farflung.protocol.seeds import derive, task_key

EXPLORE = 8
REST = 0.5
"""Steps after which a task that was taken counts for half of its worth again; one that the last step took, for none."""
PRIOR_SAMPLES = 1.0
"""Samples that the prior counts for: pass rates differ much from task to task, so half a group tells more."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A training task that may be drawn, by its position, and what committed steps saw of it."""

    position: int
    count: Count
    seen_step: int
    """The last step that took a group of it, -1 for none."""


class Drawn(msgspec.Struct, frozen=True, array_like=True):
    """A task that is drawn, and why."""

    position: int
    pool: str
    rate: float
    """The posterior's mean."""
    draw: float
    """The pass rate drawn from the posterior; -1 where the place was for any task."""


def draw(
    step_secret: bytes, step: int, places: int, seen: Sequence[Candidate], fresh: Sequence[Candidate]
) -> list[Drawn]:
    """Up to `places` tasks for a policy step, each once, those worth most first but for places that explore.

    `seen` are tasks that steps have lately tried; `fresh` the first ones of the step's shuffled order, at least as many
    as there are places, seen or not. The same arguments give the same tasks.
    """
    pool = list({one.position: one for one in (*seen, *fresh)}.values())
    if not pool:
        return []
    generator, (a, b) = _generator(step_secret, step), _posteriors(pool, step)
    offset, drawn = int(generator.integers(EXPLORE)), generator.beta(a, b)
    index = {one.position: place for place, one in enumerate(pool)}
    best = np.argsort(-drawn * (1.0 - drawn) * _rested(pool, step), kind="stable").tolist()
    merged = _merge(best, [index[one.position] for one in fresh], min(places, len(pool)), offset)
    rate = a / (a + b)
    return [
        Drawn(pool[one].position, pool_of(pool[one].count), _shown(rate[one]), -1.0 if is_any else _shown(drawn[one]))
        for one, is_any in merged.items()
    ]


def _merge(best: Sequence[int], shuffled: Sequence[int], places: int, offset: int) -> dict[int, bool]:
    """Candidates by place, the best ones but at every `EXPLORE`th place the next of the shuffled ones, and which is."""
    sources, taken = (iter(best), iter(shuffled)), dict[int, bool]()
    for place in range(places):
        is_any = place % EXPLORE == offset
        chosen = next((one for one in sources[is_any] if one not in taken), None)
        if chosen is not None:
            taken[chosen] = is_any
    return taken


def _shown(share: float) -> float:
    return round(float(share), 4)


def _rested(pool: Sequence[Candidate], step: int) -> np.ndarray:
    """How far each candidate is rested, from 0 for one that the policy has just trained on to 1."""
    ages = np.array([step - one.seen_step if one.seen_step >= 0 else np.inf for one in pool])
    return 1.0 - 0.5 ** (ages / REST)


def _posteriors(pool: Sequence[Candidate], step: int) -> tuple[np.ndarray, np.ndarray]:
    """The two parameters of each candidate's Beta posterior."""
    found = np.array([(one.count.tried, one.count.right, one.seen_step) for one in pool])
    steps = np.where(found[:, 2] >= 0, step - found[:, 2], 0)
    tried, right = found[:, :2].T * fade(steps)
    mean = (right.sum() + 1.0) / (tried.sum() + 2.0)
    return PRIOR_SAMPLES * mean + right, PRIOR_SAMPLES * (1.0 - mean) + np.maximum(0.0, tried - right)


def _generator(step_secret: bytes, step: int) -> np.random.Generator:
    key = derive(task_key(step_secret), "curriculum", step)
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "big")))


POOLS = ("unseen", "never", "rarely", "sometimes", "mostly", "always")
RARELY, MOSTLY, NEAR = 0.25, 0.75, 1e-9
"""Shares of right answers between pools; how near to none or all counts as that."""


def pool_of(count: Count) -> str:
    """The pool of a task, by the share of right answers among those it had."""
    if not count.tried:
        return "unseen"
    rate = count.right / count.tried
    if rate < NEAR:
        return "never"
    if rate > 1 - NEAR:
        return "always"
    return "rarely" if rate < RARELY else "mostly" if rate > MOSTLY else "sometimes"
