"""Coordinator: hand transcripts to scorers, take their rewards, pay for accepted tokens, complete groups."""

import json
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.audits.audit import open_audit
from farflung.audits.penalties import complete
from farflung.audits.unused import drop_groups
from farflung.envs.length import penalty
from farflung.protocol.messages import ScoreResult
from farflung.rollouts import unscorable
from farflung.store import payment
from farflung.store.evaluations import HELD_OUT
from farflung.store.run import RunContext
from farflung.store.tables import AUDITS, GROUPS, ROLLOUTS, SUBMISSIONS, TASKS
from farflung.store.transitions import move, record


def claim_scores(
    connection: Connection, run_ctx: RunContext, scorer: str, limit: int, now: float
) -> Sequence[Row[Any]]:
    """Received rollouts that no scorer works on, with task and place of the tokens, now this scorer's for a while."""
    free = (
        sa.select(ROLLOUTS.c.rollout)
        .where(ROLLOUTS.c.run == run_ctx.run, ROLLOUTS.c.status == "received")
        .where(sa.or_(ROLLOUTS.c.claimed_until < now, ROLLOUTS.c.claimed_by == scorer))  # its own: the answer was lost
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    ids = connection.execute(
        ROLLOUTS.update()
        .where(ROLLOUTS.c.rollout.in_(free))
        .values(claimed_by=scorer, claimed_until=now + run_ctx.config.coordinator.claim_s)
        .returning(ROLLOUTS.c.rollout)
    ).scalars()
    return connection.execute(
        sa.select(ROLLOUTS.c.rollout, ROLLOUTS.c.submission, ROLLOUTS.c.position, TASKS.c.payload)
        .join(GROUPS, GROUPS.c.group == ROLLOUTS.c.group)
        .join(TASKS, TASKS.c.task == GROUPS.c.task)
        .where(ROLLOUTS.c.rollout.in_(list(ids)))
    ).all()


def take_scores(
    connection: Connection, run_ctx: RunContext, scorer: str, results: Sequence[ScoreResult], now: float
) -> int:
    """Accept what was scored by this scorer, count the faults of what was not; gives how many rows changed."""
    given = {result.rollout: result for result in results}
    rows = connection.execute(
        sa.select(ROLLOUTS, GROUPS.c.purpose, GROUPS.c.task, TASKS.c.target)
        .join(GROUPS, GROUPS.c.group == ROLLOUTS.c.group)
        .join(TASKS, TASKS.c.task == GROUPS.c.task)
        .where(ROLLOUTS.c.rollout.in_(given), ROLLOUTS.c.status == "received", ROLLOUTS.c.claimed_by == scorer)
    ).all()
    scored = [row for row in rows if not given[row.rollout].error]
    if scored:
        unscorable.count_scored(run_ctx)
    _accept(connection, run_ctx, scored, given, now)
    for row in rows:
        if given[row.rollout].error and _is_received(connection, row.rollout):
            _fault(connection, run_ctx, row, given[row.rollout].error, now)
    return len(rows)


def _is_received(connection: Connection, rollout: str) -> bool:
    """Whether it still waits for a score: giving one sample up drops its whole group."""
    return connection.execute(sa.select(ROLLOUTS.c.status).where(ROLLOUTS.c.rollout == rollout)).scalar() == "received"


def _accept(
    connection: Connection, run_ctx: RunContext, rows: Sequence[Row[Any]], given: dict[str, ScoreResult], now: float
) -> None:
    if not rows:
        return
    move(connection, "rollout", [row.rollout for row in rows], "received", "accepted", now)
    connection.execute(
        ROLLOUTS.update()
        .where(ROLLOUTS.c.rollout == sa.bindparam("id"))
        .values(reward=sa.bindparam("r"), parts=sa.bindparam("p"), answer=sa.bindparam("a")),
        [_score_values(row, given[row.rollout], run_ctx.config.env.length_weight) for row in rows],
    )
    payment.pay(connection, run_ctx, [row for row in rows if row.purpose not in HELD_OUT], now)
    for group in dict.fromkeys(row.group for row in rows):
        complete(connection, group, now)


def _score_values(row: Row[Any], result: ScoreResult, weight: float) -> dict[str, Any]:
    """The values to store; only a training reward depends on the length, a held-out one is right or wrong."""
    answer = result.answer.replace("\0", "\ufffd")  # a model may write NUL, which PostgreSQL takes in no text
    off = penalty(row.tokens, row.target, weight)
    parts = result.parts | ({"task": result.reward, "length": -off} if row.target else {})
    reward = result.reward if row.purpose in HELD_OUT else result.reward - off
    return {"id": result.rollout, "r": reward, "p": json.dumps(parts), "a": answer}


def _fault(connection: Connection, run_ctx: RunContext, row: Row[Any], error: str, now: float) -> None:
    """A scorer that fails is not the rollout's fault: try again, and give up without a reward after a few."""
    faults = row.score_faults + 1
    unscorable.tell_fault(connection, run_ctx, row.rollout, error, now)
    this = ROLLOUTS.c.rollout == row.rollout
    connection.execute(ROLLOUTS.update().where(this).values(score_faults=faults, claimed_until=0.0))
    if faults >= run_ctx.config.scorer.faults:
        _give_up(connection, run_ctx, row, f"unscorable: {error}", now)
        unscorable.count_unscored(connection, run_ctx, row.rollout, error, now)
    else:
        record(connection, "rollout", [row.rollout], "received", "received", now, fault=error)


def _give_up(connection: Connection, run_ctx: RunContext, row: Row[Any], why: str, now: float) -> None:
    """An unscorable text costs its own sample: it is replayed if it was not, and the sample leased to another node.

    Where that can mend nothing, for the seed gives such a text, the group is dropped.
    """
    is_suspect = row.purpose not in HELD_OUT and not row.is_audited
    is_hopeless = not is_suspect or _was_given_up(connection, run_ctx, row)
    move(connection, "rollout", [row.rollout], "received", "dropped" if is_hopeless else "rejected", now, why=why)
    if is_suspect:
        submission = sa.select(SUBMISSIONS).where(SUBMISSIONS.c.submission == row.submission)
        open_audit(connection, run_ctx, connection.execute(submission).one(), [row.rollout], "suspicion", now)
    if is_hopeless:
        drop_groups(connection, run_ctx, [row.group], now, why="a sample cannot be scored")


def _was_given_up(connection: Connection, run_ctx: RunContext, row: Row[Any]) -> bool:
    """Whether another node's text of the same sample could not be scored either."""
    same = sa.and_(ROLLOUTS.c.group == row.group, ROLLOUTS.c.sample == row.sample, ROLLOUTS.c.status == "rejected")
    query = sa.select(ROLLOUTS.c.rollout).where(same, ROLLOUTS.c.score_faults >= run_ctx.config.scorer.faults)
    return connection.execute(query).first() is not None


def audits_waiting(connection: Connection, run_ctx: RunContext) -> int:
    """Audits that no validator has answered."""
    query = sa.select(sa.func.count()).where(AUDITS.c.run == run_ctx.run, AUDITS.c.status.in_(("open", "claimed")))
    return connection.execute(query).scalar_one()
