"""Evaluations of a run: which policy steps are due, on how many held-out tasks, and which are through. Read only.

An evaluation has two parts. In `eval` groups each task is answered once, greedily; in `sampled` groups the first of the
tasks are answered several times at the run's temperature, for pass@k. Leases call both `eval`: neither is trained on.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.config import Config
from farflung.store.tables import GROUP_COUNTS, TASKS

GREEDY, SAMPLED = "eval", "sampled"
HELD_OUT = (GREEDY, SAMPLED)
"""Purposes of groups that are never paid for and never audited."""


@dataclass(frozen=True, slots=True)
class HeldOutPart:
    """One part of every evaluation."""

    purpose: str
    tasks: int
    """Most tasks, the first ones by position."""
    samples: int
    temperature: float


def parts(config: Config) -> tuple[HeldOutPart, ...]:
    """The parts of an evaluation."""
    held_out = config.eval
    greedy = HeldOutPart(GREEDY, held_out.tasks, 1, 0.0)
    sampled = HeldOutPart(
        SAMPLED, min(held_out.tasks, held_out.sampled_tasks), held_out.samples, config.generate.temperature
    )
    return tuple(part for part in (greedy, sampled) if part.tasks and part.samples)


def size(connection: Connection, config: Config, part: HeldOutPart) -> int:
    """Held-out tasks that a part has."""
    held_out = sa.and_(TASKS.c.run == config.run.name, TASKS.c.split == "eval", TASKS.c.position < part.tasks)
    query = sa.select(sa.func.count()).where(held_out)
    return connection.execute(query).scalar_one()


def left(connection: Connection, config: Config, latest: int) -> Iterator[tuple[int, HeldOutPart]]:
    """(step, part) of the evaluations that are due up to a step and not through, oldest first."""
    done, sizes = _done(connection, config.run.name), [(part, size(connection, config, part)) for part in parts(config)]
    for step in config.eval_steps(latest):
        yield from ((step, part) for part, tasks in sizes if done.get((step, part.purpose), 0) < tasks)


def _done(connection: Connection, run: str) -> dict[tuple[int, str], int]:
    """Groups by step and purpose that are scored, or dropped: those cannot be scored and never will be."""
    rows = connection.execute(_DONE, {"of": run})
    return {(row[0], row[1]): int(row[2]) for row in rows}


_KEPT = GROUP_COUNTS.c
_DONE = (  # asked for nearly every lease
    sa.select(_KEPT.step, _KEPT.purpose, sa.func.sum(_KEPT.count))
    .where(_KEPT.run == sa.bindparam("of"), _KEPT.purpose.in_(HELD_OUT), _KEPT.status.in_(("complete", "dropped")))
    .group_by(_KEPT.step, _KEPT.purpose)
)
