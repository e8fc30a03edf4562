"""Coordinator: when a step is committed, remember what its groups told of their tasks, and draw tasks for its policy.

Both in the transaction of the commit: what is drawn for a policy is a function of the run's secret and of the steps
before, whenever it is leased. `curriculum.py` chooses; here its choice becomes a column of the step.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.learner.difficulty import Count, add, faded
from farflung.store.bulk import update_rows
from farflung.store.run import RunContext
from farflung.store.tables import GROUPS, NODES, ROLLOUTS, SEEN, STEPS, TASKS
from farflung.store.transitions import slices
from farflung.tasks.assign import task_order
from farflung.tasks.curriculum import Candidate, Drawn, draw

LATELY = 128
"""Steps after which a task counts among the untried again; four half-lives leave a sixteenth of its count."""
MOST_DRAWN = 1024
"""Tasks drawn for a step; any beyond come in shuffled order."""
MOST_SEEN = 2048
"""Candidates among the tasks that steps have tried, those tried last first."""


def settle(connection: Connection, run_ctx: RunContext, step: int) -> list[Drawn]:
    """Learn from the groups that a step has just consumed, and draw the tasks of its policy."""
    _remember(connection, run_ctx, step)
    if run_ctx.config.learn.curriculum == "uniform":
        return []
    drawn = _draw(connection, run_ctx, step)
    this = STEPS.update().where(STEPS.c.run == run_ctx.run, STEPS.c.step == step)
    connection.execute(this.values(drawn=msgspec.json.encode(drawn)))
    return drawn


def drawn_for(connection: Connection, run_ctx: RunContext, step: int) -> list[Drawn]:
    """The tasks that were drawn for a policy, best first; none in a run that takes all alike."""
    query = sa.select(STEPS.c.drawn).where(STEPS.c.run == run_ctx.run, STEPS.c.step == step)
    return drawn_from(connection.execute(query).scalar())


def drawn_from(stored: bytes | None) -> list[Drawn]:
    """Drawn tasks out of a step's column."""
    return msgspec.json.decode(stored, type=list[Drawn]) if stored else []


def places(run_ctx: RunContext, step: int) -> int:
    """As many tasks as are opened at a policy, unless much of what is generated is lost."""
    config, groups = run_ctx.config, run_ctx.config.learn.groups
    most = config.most_groups(step) if config.learn.lockstep else config.most_groups(step) + groups
    return min(len(run_ctx.tasks), most, MOST_DRAWN)


# --- what groups tell of their tasks ---------------------------------------------------------------------------------


def _remember(connection: Connection, run_ctx: RunContext, step: int) -> None:
    """Keep the count of each task of which the step took groups, those without variance included."""
    rows = connection.execute(_TAKEN, {"of": run_ctx.run, "step": step}).all()
    counts: dict[str, Count] = {}
    for row in rows:
        before = counts.get(row.task) or _before(row, step)
        counts[row.task] = add(before, row.samples, _right(row), row.tokens)
    written = [
        {"task": task, "tried": one.tried, "right": one.right, "tokens": one.tokens, "seen_step": step}
        for task, one in counts.items()
    ]
    update_rows(connection, TASKS, written)


def _before(row: Row[Any], step: int) -> Count:
    count = Count(row.tried, row.right, row.task_tokens)
    return faded(count, step - row.seen_step) if row.seen_step >= 0 else count


def _right(row: Row[Any]) -> float:
    """Right answers, parts of them included; equal rewards teach nothing, so they are all right or all wrong."""
    mean = round(row.mean, 6)  # whatever order a database adds them up in
    return row.samples * (mean if row.is_informative else round(mean))


_CLIPPED = sa.case((ROLLOUTS.c.reward < 0.0, 0.0), (ROLLOUTS.c.reward > 1.0, 1.0), else_=ROLLOUTS.c.reward)
_TAKEN = (
    sa.select(
        GROUPS.c.group,
        GROUPS.c.task,
        GROUPS.c.is_informative,
        TASKS.c.tried,
        TASKS.c.right,
        TASKS.c.tokens.label("task_tokens"),
        TASKS.c.seen_step,
        sa.func.count().label("samples"),
        sa.func.avg(_CLIPPED).label("mean"),
        sa.func.sum(ROLLOUTS.c.tokens).label("tokens"),
    )
    .join(TASKS, TASKS.c.task == GROUPS.c.task)
    .join(ROLLOUTS, ROLLOUTS.c.group == GROUPS.c.group)
    .join(NODES, NODES.c.node == ROLLOUTS.c.node)
    .where(
        GROUPS.c.run == sa.bindparam("of"),
        GROUPS.c.batch_step == sa.bindparam("step"),
        GROUPS.c.status.in_(("trained", "dropped")),
        ROLLOUTS.c.status.in_(("trained", "dropped")),
        ROLLOUTS.c.reward.is_not(None),
        NODES.c.status.in_(("probation", "trusted")),
    )
    .group_by(GROUPS.c.group, TASKS.c.task)
    .order_by(GROUPS.c.step, GROUPS.c.task)
)


# --- drawing ---------------------------------------------------------------------------------------------------------


def _draw(connection: Connection, run_ctx: RunContext, step: int) -> list[Drawn]:
    wanted, secret = places(run_ctx, step), run_ctx.step_secret(step)
    fresh = list(itertools.islice(task_order(secret, step, len(run_ctx.tasks)), wanted))
    known = {"of": run_ctx.run, "since": max(0, step - LATELY)}
    seen = connection.execute(_SEEN, known).all()
    return draw(secret, step, wanted, _candidates(seen), _fresh(connection, run_ctx, fresh))


def _fresh(connection: Connection, run_ctx: RunContext, positions: Sequence[int]) -> list[Candidate]:
    """Candidates at these positions, in this order."""
    ids = [run_ctx.tasks[position][0] for position in positions]
    rows = (row for part in slices(ids) for row in connection.execute(_FRESH, {"ids": part}))
    found = {one.position: one for one in _candidates(rows)}
    return [found[position] for position in positions]


def _candidates(rows: Iterable[Row[Any]]) -> list[Candidate]:
    return [Candidate(row.position, Count(row.tried, row.right, row.tokens), row.seen_step) for row in rows]


_COUNTS = sa.select(TASKS.c.position, TASKS.c.tried, TASKS.c.right, TASKS.c.tokens, TASKS.c.seen_step)
_FRESH = _COUNTS.where(TASKS.c.task.in_(sa.bindparam("ids", expanding=True)))
_SEEN = (
    _COUNTS.where(TASKS.c.run == sa.bindparam("of"), sa.text(SEEN), TASKS.c.seen_step >= sa.bindparam("since"))
    .order_by(TASKS.c.seen_step.desc(), TASKS.c.position)
    .limit(MOST_SEEN)
)
