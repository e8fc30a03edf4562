"""Held-out scores by policy step, with the intervals that hold the true ones. Read only."""

from collections import defaultdict
from collections.abc import Iterator

import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.config import Config
from farflung.learner.difficulty import RIGHT
from farflung.learner.estimate import interval, pass_at_k
from farflung.protocol.messages import EvalView
from farflung.store import evaluations
from farflung.store.tables import GROUPS, ROLLOUTS


def evals(connection: Connection, config: Config) -> list[EvalView]:
    """Scores of policies whose greedy evaluation has begun; pass@k as far as its tasks are complete."""
    rows = connection.execute(
        sa.select(GROUPS.c.step, sa.func.avg(GROUPS.c.reward), sa.func.count())
        .where(GROUPS.c.run == config.run.name, GROUPS.c.purpose == evaluations.GREEDY, GROUPS.c.status == "complete")
        .group_by(GROUPS.c.step)
        .order_by(GROUPS.c.step)
    ).all()
    sampled = _sampled(connection, config.run.name)
    return [view(row[0], row[1], row[2], sampled.get(row[0], []), config.eval.k) for row in rows]


def shown(connection: Connection, config: Config) -> list[EvalView]:
    """The parts of which nothing is to come any more: while one goes on, its easy tasks may be done first."""
    going = {(step, part.purpose) for step, part in evaluations.left(connection, config, config.run.steps)}
    done = [found for found in evals(connection, config) if (found.step, evaluations.GREEDY) not in going]
    return [_greedy(found) if (found.step, evaluations.SAMPLED) in going else found for found in done]


def finished(connection: Connection, config: Config, among: set[int]) -> list[EvalView]:
    """Evaluations of some steps with every part through; scores are only looked for where there are any."""
    through = among - {step for step, _ in evaluations.left(connection, config, config.run.steps)}
    return [found for found in evals(connection, config) if found.step in through] if through else []


def _greedy(found: EvalView) -> EvalView:
    return view(found.step, found.score, found.tasks, [], 0)


def view(step: int, score: float, tasks: int, sampled: list[tuple[int, int]], k: int) -> EvalView:
    """One evaluation; `sampled` has (samples, right ones) of each task. Pure.

    The interval of pass@k is Wilson's for as many tasks: a task's estimate lies between 0 and 1, so it varies at most
    as much as one that is either right or wrong, and the interval is rather too wide.
    """
    low, high = interval(score, tasks)
    chances = [pass_at_k(samples, right, k) for samples, right in sampled if samples >= k]
    if not chances:
        return EvalView(step=step, score=score, tasks=tasks, low=low, high=high)
    mean = sum(chances) / len(chances)
    k_low, k_high = interval(mean, len(chances))
    return EvalView(
        step=step,
        score=score,
        tasks=tasks,
        low=low,
        high=high,
        pass_k=mean,
        pass_k_low=k_low,
        pass_k_high=k_high,
        pass_k_tasks=len(chances),
        k=k,
    )


def _sampled(connection: Connection, run: str) -> dict[int, list[tuple[int, int]]]:
    """By step, (samples, right ones) of every task that is complete."""
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for step, samples, right in _counts(connection, run):
        found[step].append((samples, right))
    return found


def _counts(connection: Connection, run: str) -> Iterator[tuple[int, int, int]]:
    is_right = sa.case((ROLLOUTS.c.reward >= RIGHT, 1), else_=0)
    rows = connection.execute(
        sa.select(GROUPS.c.step, sa.func.count(), sa.func.sum(is_right))
        .join(ROLLOUTS, ROLLOUTS.c.group == GROUPS.c.group)
        .where(
            GROUPS.c.run == run,
            GROUPS.c.purpose == evaluations.SAMPLED,
            GROUPS.c.status == "complete",
            ROLLOUTS.c.status == "accepted",
        )
        .group_by(GROUPS.c.group, GROUPS.c.step)
    )
    return ((row[0], row[1], int(row[2])) for row in rows)
