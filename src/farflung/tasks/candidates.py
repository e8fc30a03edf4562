"""Coordinator: candidates for a lease, out of the database: samples that no node has, tasks that are next."""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.protocol.states import REOPENING, statuses
from farflung.store.db import after_commit
from farflung.store.run import RunContext
from farflung.store.tables import GROUPS, ROLLOUTS, STEPS, TASKS
from farflung.store.transitions import slices
from farflung.tasks.assign import NextTask, OpenSamples, task_order
from farflung.tasks.draw import drawn_for

ORDERS_KEPT = 8
MOST_LOOK_AHEAD = 256
Samples = dict[str, set[int]]
"""Group → some of its samples."""


class Owners(NamedTuple):
    """The samples of some groups that nodes have, or had."""

    owned: Samples
    reopened: Samples
    """Samples that a node had and that are open again."""
    handed_in: dict[str, dict[int, set[str]]]
    """Group → sample → the nodes that handed in a rollout of it which came to nothing."""


_OPEN_GROUPS = (
    sa.select(GROUPS, sa.func.length(TASKS.c.prompt_ids).label("prompt_bytes"))
    .join(TASKS, TASKS.c.task == GROUPS.c.task)
    .where(
        GROUPS.c.run == sa.bindparam("of"),
        GROUPS.c.purpose == "train",
        GROUPS.c.status == sa.literal_column("'open'"),  # not a parameter, or SQLite does not see that
        GROUPS.c.free > sa.literal_column("0"),  # the index `group_free` will do
        GROUPS.c.step >= sa.bindparam("oldest"),
    )
)


def open_groups(connection: Connection, run_ctx: RunContext, oldest: int) -> Sequence[Row[Any]]:
    """Training groups of these steps with samples that no node has."""
    return connection.execute(_OPEN_GROUPS, {"of": run_ctx.run, "oldest": oldest}).all()


def open_samples(run_ctx: RunContext, groups: Sequence[Row[Any]], owners: Owners) -> Iterator[OpenSamples]:
    """Samples of these groups that no node has, set apart by the nodes that may not have them."""
    for row in groups:
        needed = row.prompt_bytes // 4 + run_ctx.config.generate.max_new_tokens
        parts: dict[tuple[bool, frozenset[str]], list[int]] = defaultdict(list)
        for sample in sorted(set(range(row.samples)) - owners.owned[row.group]):
            not_for = frozenset(owners.handed_in[row.group].get(sample, ()))
            parts[sample in owners.reopened[row.group], not_for].append(sample)
        for (is_reopened, not_for), samples in sorted(parts.items(), key=lambda part: part[1]):
            at = row.opened_at if is_reopened else None
            yield OpenSamples(row.group, row.task, row.step, tuple(samples), needed, at, not_for)


_OWNERS = sa.select(
    ROLLOUTS.c.group, ROLLOUTS.c.sample, ROLLOUTS.c.status, ROLLOUTS.c.node, ROLLOUTS.c.submission
).where(ROLLOUTS.c.group.in_(sa.bindparam("groups", expanding=True)))


def owners(connection: Connection, groups: Sequence[str]) -> Owners:
    """The samples of these groups that nodes have, or had."""
    found = Owners(defaultdict(set), defaultdict(set), defaultdict(dict))
    for part in slices(groups):
        for group, sample, status, node, submission in connection.execute(_OWNERS, {"groups": part}):
            (found.reopened if status in REOPENING else found.owned)[group].add(sample)
            if submission is not None and status in REOPENING:
                found.handed_in[group].setdefault(sample, set()).add(node)
    return found


_USEFUL = sa.case((GROUPS.c.is_informative, 1), else_=0)
_COMPLETE = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(_USEFUL), 0)).where(
    GROUPS.c.run == sa.bindparam("of"), GROUPS.c.purpose == "train", GROUPS.c.status == "complete"
)
_OPEN = sa.select(sa.func.coalesce(sa.func.sum(STEPS.c.open_groups), 0)).where(
    STEPS.c.run == sa.bindparam("of"), STEPS.c.step >= sa.bindparam("oldest")
)
_OF_POLICY = sa.select(
    sa.func.count(),
    sa.func.coalesce(sa.func.sum(sa.case((GROUPS.c.status == "open", 1), else_=_USEFUL)), 0),
).where(
    GROUPS.c.run == sa.bindparam("of"),
    GROUPS.c.purpose == "train",
    GROUPS.c.status.in_(statuses("group")),  # any, but so that the index finds the step
    GROUPS.c.step == sa.bindparam("at"),
)


def groups_now(connection: Connection, run_ctx: RunContext, latest: int) -> int:
    """Groups in progress, or waiting for the trainer and with variance; in lockstep, those ever opened at the policy.

    A group without variance makes room for another, unless there would be more than a step looks at. Open ones too old
    to be leased do not count: enough of them, each short of a sample, would end all leasing.
    """
    if run_ctx.config.learn.lockstep:
        of_policy = connection.execute(_OF_POLICY, {"of": run_ctx.run, "at": latest}).one()
        return room_taken(run_ctx, latest, *map(int, of_policy))
    oldest = latest - max(1, run_ctx.config.learn.max_staleness) + 1
    complete, useful = connection.execute(_COMPLETE, {"of": run_ctx.run}).one()
    opened = int(connection.execute(_OPEN, {"of": run_ctx.run, "oldest": oldest}).scalar_one())
    return room_taken(run_ctx, latest, opened + complete, opened + int(useful))


def room_taken(run_ctx: RunContext, policy: int, known: int, hopeful: int) -> int:
    """How much of the room for groups is taken: by those that have variance or may come to, or by all of them."""
    config = run_ctx.config
    return max(hopeful, known - config.most_groups(policy) + config.wanted_groups(policy))


def next_tasks(connection: Connection, run_ctx: RunContext, step: int, size: int) -> Iterator[NextTask]:
    """Tasks not opened at this step yet, drawn ones first, then in the order that its secret shuffles.

    `size` are looked up at first.
    """
    order = _task_order(connection, run_ctx, step)
    start = order.begin
    while positions := order.from_(start, size):
        opened = _opened(connection, run_ctx, step, [run_ctx.tasks[position][0] for position in positions])
        found = [run_ctx.tasks[position] for position in positions]
        left = [number for number, (task, _) in enumerate(found) if task not in opened]
        if start == order.begin:
            after_commit(connection, partial(order.skip_to, start + min(left, default=len(found))))
        for number in left:
            task, prompt_tokens = found[number]
            yield NextTask(task, prompt_tokens + run_ctx.config.generate.max_new_tokens)
        start, size = start + size, MOST_LOOK_AHEAD


_OPENED = sa.select(GROUPS.c.task).where(
    GROUPS.c.task.in_(sa.bindparam("tasks", expanding=True)),
    GROUPS.c.run == sa.bindparam("of"),
    GROUPS.c.step == sa.bindparam("at"),
    GROUPS.c.purpose == "train",
)


def _opened(connection: Connection, run_ctx: RunContext, step: int, tasks: Sequence[str]) -> set[str]:
    """Which of these have a group at this step."""
    return set(connection.execute(_OPENED, {"tasks": tasks, "of": run_ctx.run, "at": step}).scalars())


class _TaskOrder:
    """The order of one step's tasks, drawn as far as a caller looked. All before `begin` are opened, and stay so."""

    def __init__(self, source: Iterator[int]) -> None:
        self._source, self._seen, self.begin = source, list[int](), 0

    def from_(self, start: int, size: int) -> list[int]:
        """Up to `size` tasks from place `start` on."""
        self._seen += itertools.islice(self._source, max(0, start + size - len(self._seen)))
        return self._seen[start : start + size]

    def skip_to(self, begin: int) -> None:
        """Never look at what is before this place again."""
        self.begin = max(self.begin, begin)


def _task_order(connection: Connection, run_ctx: RunContext, step: int) -> _TaskOrder:
    """Kept with the run's context, for two databases may have opened different tasks of one order."""
    if step not in run_ctx.task_orders:
        for old in sorted(run_ctx.task_orders)[: 1 - ORDERS_KEPT]:
            del run_ctx.task_orders[old]
        first = {one.position: None for one in drawn_for(connection, run_ctx, step)}
        shuffled = task_order(run_ctx.step_secret(step), step, len(run_ctx.tasks))
        others = (position for position in shuffled if position not in first)
        run_ctx.task_orders[step] = _TaskOrder(itertools.chain(first, others))
    return run_ctx.task_orders[step]
