"""Held-out answers before and after training, a few of them, out of a run's own records."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.config import Config, load_run
from farflung.rollouts.archive import Archive
from farflung.store.blobs import Blobs
from farflung.store.sql_connections import reading
from farflung.store.tables import GROUPS, ROLLOUTS, TASKS
from farflung.tasks.create_run import Model

SHOWN = 5


@dataclass(frozen=True)
class Pair:
    """One question and two answers."""

    prompt: str
    before: str
    before_reward: float
    after: str
    after_reward: float


async def five_answers(folder: Path) -> list[Pair]:
    """Held-out questions whose answer at the first and the last evaluated step is known, those that changed first."""
    config = load_run(folder)
    with reading(config.database_url) as connection:
        rows = _pairs(connection, config)
    changed = [row for row in rows if row.before_reward != row.after_reward]
    same = [row for row in rows if row.before_reward == row.after_reward]
    return await _texts(config, (changed[: SHOWN - 1] + same)[:SHOWN])


def _pairs(connection: Connection, config: Config) -> list[Any]:
    def answers(step: int) -> Any:
        return (
            sa.select(GROUPS.c.task, ROLLOUTS.c.submission, ROLLOUTS.c.position, ROLLOUTS.c.reward)
            .join(ROLLOUTS, ROLLOUTS.c.group == GROUPS.c.group)
            .where(
                GROUPS.c.run == config.run.name,
                GROUPS.c.purpose == "eval",
                GROUPS.c.step == step,
                ROLLOUTS.c.status == "accepted",
            )
            .subquery()
        )

    before, after = answers(0), answers(config.run.steps)
    query = (
        sa.select(
            TASKS.c.prompt,
            before.c.submission.label("before"),
            before.c.position.label("before_place"),
            before.c.reward.label("before_reward"),
            after.c.submission.label("after"),
            after.c.position.label("after_place"),
            after.c.reward.label("after_reward"),
        )
        .join(before, before.c.task == TASKS.c.task)
        .join(after, after.c.task == TASKS.c.task)
        .order_by(TASKS.c.position)
    )
    return list(connection.execute(query))


async def _texts(config: Config, rows: list[Any]) -> list[Pair]:
    archive = Archive(Blobs(config.submissions_url), Model(config.model.path).tokenizer, config.generate.stop)

    async def text(submission: str, place: int) -> str:
        return archive.text((await archive.body(submission)).rollouts[place].ids).strip()

    return [
        Pair(
            row.prompt,
            await text(row.before, row.before_place),
            row.before_reward,
            await text(row.after, row.after_place),
            row.after_reward,
        )
        for row in rows
    ]
