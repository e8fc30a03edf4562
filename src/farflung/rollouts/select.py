"""Coordinator: choose the groups that make a step, and hand them to the trainer that claims it.

Claiming is idempotent: asked again, after a crash, the same groups come back, those of committed steps included.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.audits import breaker, canary
from farflung.audits.penalties import hold
from farflung.audits.unused import drop_groups, one_of_each
from farflung.protocol import seeds
from farflung.protocol.errors import Conflict
from farflung.protocol.messages import Batch, BatchGroup, BatchRollout
from farflung.rollouts import unscorable
from farflung.store.run import RunContext
from farflung.store.tables import AUDITS, GROUP_COUNTS, GROUPS, ROLLOUTS, STEPS, SUBMISSIONS, TASKS
from farflung.store.transitions import move, record


def claim_step(connection: Connection, run_ctx: RunContext, step: int, now: float) -> Batch | str:
    """The batch of a step, or why there is none yet. Raises Conflict for a step out of turn."""
    row = step_row(connection, run_ctx, step)
    if row is None:
        latest = run_ctx.latest(connection).step
        if step != latest + 1:
            raise Conflict(f"step {step} cannot be claimed: the latest is {latest}, claim {latest + 1}")
        if step > run_ctx.config.run.steps:
            return f"the run ends with step {run_ctx.config.run.steps}"
        waits = breaker.reason(connection, run_ctx.run) or _open_step(connection, run_ctx, step, now)
        if waits:
            return waits
        row = step_row(connection, run_ctx, step)
    assert row is not None, "opened above"
    return _batch(connection, run_ctx, row)


def step_row(connection: Connection, run_ctx: RunContext, step: int) -> Row[Any] | None:
    """A step of the run, once it was claimed."""
    return connection.execute(sa.select(STEPS).where(STEPS.c.run == run_ctx.run, STEPS.c.step == step)).first()


def _open_step(connection: Connection, run_ctx: RunContext, step: int, now: float) -> str:
    """Choose the groups of a new step; gives what it waits for, or nothing once it is open. Step 0 takes none."""
    chosen: list[Row[Any]] | None = []
    if step > 0:
        if run_ctx.config.learn.lockstep:
            ready, chosen = _lockstep(connection, run_ctx, step)
        else:
            ready = _ready(connection, run_ctx, step)
            chosen = choose(ready, run_ctx.config.learn.groups, run_ctx.config.learn.oversample)
            if chosen is None and ready and _are_tasks_spent(connection, run_ctx, step):
                chosen = list(ready)
        if chosen is None:
            useful = sum(row.is_informative for row in ready)
            return f"{useful} of {run_ctx.config.learn.groups} groups are ready ({len(ready)} complete)"
    identity = f"{run_ctx.run}-step-{step}"
    rewards = [row.reward for row in chosen]
    connection.execute(
        STEPS.insert().values(
            id=identity,
            run=run_ctx.run,
            step=step,
            status="open",
            claimed_at=now,
            seen_groups=len(chosen),
            seen_reward=sum(rewards) / len(rewards) if rewards else 0.0,
        )
    )
    record(connection, "step", [identity], "", "open", now, groups=len(chosen))
    unscorable.tell_nothing_learned(connection, run_ctx, step, chosen, now)
    _take(connection, run_ctx, chosen, step, now)
    return ""


def _ready(connection: Connection, run_ctx: RunContext, step: int) -> Sequence[Row[Any]]:
    """Complete groups that are fresh enough to train `step`, oldest policy first."""
    query = sa.select(GROUPS).where(
        GROUPS.c.run == run_ctx.run,
        GROUPS.c.purpose == "train",
        GROUPS.c.status == "complete",
        GROUPS.c.step >= step - 1 - run_ctx.config.learn.max_staleness,
    )
    return connection.execute(query.order_by(GROUPS.c.step, GROUPS.c.group)).all()


def _are_tasks_spent(connection: Connection, run_ctx: RunContext, step: int) -> bool:
    """Whether every task was opened for the latest policy and none is under way; some could not be scored, say."""
    kept, oldest = GROUP_COUNTS.c, step - 1 - run_ctx.config.learn.max_staleness
    fresh = sa.and_(kept.run == run_ctx.run, kept.purpose == "train", kept.step >= oldest, kept.count > 0)
    rows = connection.execute(sa.select(kept.step, kept.status, kept.count).where(fresh)).all()
    is_any_open = any(row.status == "open" for row in rows)
    return not is_any_open and sum(row[2] for row in rows if row.step == step - 1) >= len(run_ctx.tasks)


def _lockstep(
    connection: Connection, run_ctx: RunContext, step: int
) -> tuple[Sequence[Row[Any]], list[Row[Any]] | None]:
    """The complete groups of those that this step is bound to, and the step's share of them once all are.

    They are those of one policy, and whole once enough have variance or no more are asked for; the base model's are
    dealt out to the first steps in the order of their tasks.
    """
    config = run_ctx.config
    policy = max(0, step - 1 - config.learn.max_staleness)
    query = sa.select(GROUPS).where(GROUPS.c.run == run_ctx.run, GROUPS.c.purpose == "train", GROUPS.c.step == policy)
    rows = connection.execute(query.order_by(GROUPS.c.task)).all()
    ready = [row for row in rows if row.status == "complete"]
    most = min(config.most_groups(policy), len(run_ctx.tasks))
    useful = [row for row in rows if row.is_informative]
    is_enough = len(useful) >= config.lockstep_groups(policy) or len(rows) >= most
    if not is_enough or any(row.status == "open" for row in rows):
        return ready, None
    steps, own = (config.learn.max_staleness + 1, step - 1) if policy == 0 else (1, 0)
    alike = [row for row in rows if row.is_informative is False]
    share = sorted([*useful[own::steps], *alike[own::steps]], key=lambda row: row.task)
    return ready, [row for row in share if row.status == "complete"]


def choose(ready: Sequence[Any], groups: int, oversample: float) -> list[Any] | None:
    """The first groups that hold `groups` informative ones, or `oversample` times as many of any kind.

    None if there are too few.
    """
    useful = 0
    for count, row in enumerate(ready, 1):
        useful += bool(row.is_informative)
        if useful >= groups or count >= groups * oversample:
            return list(ready[:count])
    return None


def _take(connection: Connection, run_ctx: RunContext, chosen: Sequence[Row[Any]], step: int, now: float) -> None:
    """Informative groups go into the batch, the others are done with: equal rewards have no gradient."""
    useful = [row.group for row in chosen if row.is_informative]
    connection.execute(GROUPS.update().where(GROUPS.c.group.in_([row.group for row in chosen])).values(batch_step=step))
    alike = [row.group for row in chosen if not row.is_informative]
    drop_groups(connection, run_ctx, alike, now, why="zero variance", is_looked_at=True)
    move(connection, "group", useful, "complete", "batched", now, step=step)
    query = sa.select(ROLLOUTS.c.rollout).where(ROLLOUTS.c.group.in_(useful), ROLLOUTS.c.status == "accepted")
    move(connection, "rollout", list(connection.execute(query).scalars()), "accepted", "batched", now, step=step)


def _batch(connection: Connection, run_ctx: RunContext, row: Row[Any]) -> Batch:
    is_done = bool(row.weights_digest)
    return Batch(
        step=row.step,
        seen_groups=row.seen_groups,
        seen_reward=row.seen_reward,
        secret_commitment=seeds.commitment(run_ctx.step_secret(row.step)).hex(),
        probe=seeds.probe_key(run_ctx.step_secret(row.step)).hex(),
        temperature=run_ctx.config.generate.temperature,
        groups=_groups(connection, run_ctx, _of_step(run_ctx, row.step, ("batched", "trained")), sa.true()),
        spare=[] if is_done else _spare(connection, run_ctx, row.step),
        canaries=[] if is_done else canary.requests(connection, run_ctx, row.step),
        restores=-1 if row.restores is None else row.restores,
        committed=row.weights_digest or "",
    )


def _of_step(run_ctx: RunContext, step: int, statuses: Sequence[str]) -> Any:
    return sa.and_(GROUPS.c.run == run_ctx.run, GROUPS.c.batch_step == step, GROUPS.c.status.in_(statuses))


def _spare(connection: Connection, run_ctx: RunContext, step: int) -> list[BatchGroup]:
    """One rollout of each submission among groups without variance: they teach nothing, but were paid for."""
    rows = connection.execute(
        sa.select(ROLLOUTS.c.rollout, ROLLOUTS.c.submission, ROLLOUTS.c.group, GROUPS.c.step)
        .join(GROUPS, GROUPS.c.group == ROLLOUTS.c.group)
        .where(_of_step(run_ctx, step, ("dropped",)), ~GROUPS.c.is_informative, ROLLOUTS.c.reward.is_not(None))
        .where(ROLLOUTS.c.status == "dropped")
        .order_by(ROLLOUTS.c.group, ROLLOUTS.c.sample)
    ).all()
    drawn = one_of_each(run_ctx, rows)
    suspicion = sa.and_(AUDITS.c.submission == ROLLOUTS.c.submission, AUDITS.c.kind == "suspicion")
    which = sa.and_(ROLLOUTS.c.rollout.in_([row.rollout for row in drawn]), ~sa.exists().where(suspicion))
    return _groups(connection, run_ctx, GROUPS.c.group.in_({row.group for row in drawn}), which)


def _groups(connection: Connection, run_ctx: RunContext, which: Any, rollouts: Any) -> list[BatchGroup]:
    """Groups with those of their rollouts that the step consumes or consumed, or dropped."""
    rows = connection.execute(
        sa.select(GROUPS, TASKS.c.prompt_ids)
        .join(TASKS, TASKS.c.task == GROUPS.c.task)
        .where(which)
        .order_by(GROUPS.c.step, GROUPS.c.task)
    ).all()
    found = _rollouts(connection, run_ctx, {row.group: row for row in rows}, rollouts)
    return [
        BatchGroup(
            group=row.group,
            step=row.step,
            manifest=run_ctx.manifest_of(connection, row.step),
            prompt_ids=row.prompt_ids,
            rollouts=found[row.group],
        )
        for row in rows
        if found[row.group]
    ]


def _rollouts(
    connection: Connection, run_ctx: RunContext, groups: Mapping[str, Row[Any]], which: Any
) -> dict[str, list[BatchRollout]]:
    found: dict[str, list[BatchRollout]] = {group: [] for group in groups}
    known = sa.and_(ROLLOUTS.c.status.in_(("batched", "trained", "dropped")), ROLLOUTS.c.reward.is_not(None))
    query = sa.select(ROLLOUTS, SUBMISSIONS.c.profile).join(
        SUBMISSIONS, SUBMISSIONS.c.submission == ROLLOUTS.c.submission
    )
    query = query.where(ROLLOUTS.c.group.in_(groups), known, which)
    for row in connection.execute(query.order_by(ROLLOUTS.c.sample)):
        found[row.group].append(
            BatchRollout(
                rollout=row.rollout,
                submission=row.submission,
                sample=row.sample,
                reward=row.reward,
                seed=seeds.sample_seed(run_ctx.step_secret(groups[row.group].step), groups[row.group].task, row.sample),
                is_audited=row.is_audited,
                profile=row.profile,
            )
        )
    return found


def trip(connection: Connection, run_ctx: RunContext, step: int, submissions: Sequence[str], now: float) -> int:
    """Take submissions that the tripwire caught out of an open step, with their groups, and have them audited in full.

    Other untrained rollouts of their nodes are held too. Gives how many audits that opens; 0 if it was done before.
    Raises Conflict for a step that is not open.
    """
    row = step_row(connection, run_ctx, step)
    if row is None or row.status != "open":
        raise Conflict(f"step {step} is not open; the tripwire looks at a batch before it is trained on")
    of_these = SUBMISSIONS.c.submission.in_(submissions)
    nodes = list(connection.execute(sa.select(SUBMISSIONS.c.node).where(of_these).distinct()).scalars())
    why = f"the tripwire of step {step}"
    opened = hold(connection, run_ctx, ROLLOUTS.c.submission.in_(submissions), why, now, live=("batched",))
    return opened + hold(connection, run_ctx, ROLLOUTS.c.node.in_(nodes), why, now)
