"""Training tasks in pools by pass rate, and how many of each were drawn lately. Read only.

What is drawn for a step is told once no step can train on it any more, so that no node knows what will be asked.
"""

from collections import Counter
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.config import Config
from farflung.queries.redact import Redaction
from farflung.store.tables import GROUPS, SEEN, STEPS, TASKS
from farflung.tasks.curriculum import MOSTLY, NEAR, POOLS, RARELY
from farflung.tasks.draw import drawn_from

LATELY = 8
"""Steps whose groups are counted as drawn lately."""


@dataclass(frozen=True)
class Pool:
    """The training tasks of like pass rate."""

    name: str
    tasks: int
    drawn: int
    """Groups opened lately of tasks that were drawn as such."""


def pools(connection: Connection, config: Config, latest: int, redaction: Redaction) -> list[Pool]:
    """All pools, those of tasks that no step has tried first."""
    run = config.run.name
    counted, lately = _tasks(connection, run), _drawn(connection, run, latest, redaction)
    return [Pool(name, counted[name], lately[name]) for name in POOLS]


_RATE = TASKS.c.right / TASKS.c.tried
_POOL = sa.case(
    (TASKS.c.tried <= 0, "unseen"),
    (_RATE < NEAR, "never"),
    (_RATE > 1 - NEAR, "always"),
    (_RATE < RARELY, "rarely"),
    (_RATE > MOSTLY, "mostly"),
    else_="sometimes",
)
_SEEN_TASKS = sa.select(_POOL, sa.func.count()).where(TASKS.c.run == sa.bindparam("of"), sa.text(SEEN)).group_by(_POOL)
_TRAINING = sa.select(sa.func.coalesce(sa.func.max(TASKS.c.position) + 1, 0)).where(  # the index has it at its end
    TASKS.c.run == sa.bindparam("of"), TASKS.c.split == "train"
)


def _tasks(connection: Connection, run: str) -> Counter[str]:
    found = Counter[str]({row[0]: row[1] for row in connection.execute(_SEEN_TASKS, {"of": run})})
    found["unseen"] += connection.execute(_TRAINING, {"of": run}).scalar_one() - found.total()
    return found


def _drawn(connection: Connection, run: str, latest: int, redaction: Redaction) -> Counter[str]:
    until = latest + 1 if redaction.since is None else redaction.since
    steps = sa.and_(STEPS.c.run == run, STEPS.c.step >= until - LATELY, STEPS.c.step < until)
    stored = connection.execute(sa.select(STEPS.c.step, STEPS.c.drawn).where(steps)).all()
    pool_of = {(row.step, one.position): one.pool for row in stored for one in drawn_from(row.drawn)}
    query = sa.select(GROUPS.c.step, TASKS.c.position).join(TASKS, TASKS.c.task == GROUPS.c.task)
    mine = sa.and_(GROUPS.c.run == run, GROUPS.c.purpose == "train", GROUPS.c.step >= until - LATELY)
    opened = connection.execute(query.where(mine, GROUPS.c.step < until)).all()
    return Counter(pool_of[step, position] for step, position in opened if (step, position) in pool_of)
