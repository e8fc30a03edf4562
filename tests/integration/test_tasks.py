"""Which tasks a run trains on and what it knows of them: the task filter, the running difficulty, the length limit."""

import asyncio
import json

import pytest
import sqlalchemy as sa
from tests.conftest import named, settings

from farflung.ops.filter_tasks import Band, filter_tasks
from farflung.protocol.errors import ConfigError
from farflung.store.db import Database, migrate
from farflung.store.tables import ROLLOUTS, TASKS
from farflung.tasks import task_filter
from farflung.tasks.create_run import Model, create_run


def rows_of(config):
    """The training tasks that a run of this configuration is founded with."""
    config.folder.mkdir(parents=True, exist_ok=True)
    migrate(config.database_url)

    async def make():
        database = Database(config.database_url)
        await create_run(config, database, Model(config.model.path), named("coordinator"), 1.0)
        with database.engine.connect() as connection:
            rows = connection.execute(sa.select(TASKS).order_by(TASKS.c.split, TASKS.c.position)).all()
        database.close()
        return rows

    return asyncio.run(make())


def test_the_filter_keeps_what_is_sometimes_right_and_the_run_reads_it(tmp_path) -> None:
    config = settings(tmp_path, env={"train_tasks": 12}, generate={"max_new_tokens": 32})
    out = tmp_path / "kept.jsonl"
    chosen, tried = asyncio.run(filter_tasks(config, out, Band(4, 0.0, 1.0)))
    assert tried == len(chosen) == 12
    assert {one.tried for one in chosen} == {4}
    again = tmp_path / "again.jsonl"
    band, _ = asyncio.run(filter_tasks(config, again, Band(4, 0.25, 0.75)))
    assert band == [one for one in chosen if 0.25 <= one.right / 4 <= 0.75], "the same seeds give the same counts"
    assert 1 < len(band) < 12
    run = settings(tmp_path, run={"name": "kept"}, env={"train_tasks": 12, "keep": str(again)})
    rows = rows_of(run)
    train = [row for row in rows if row.split == "train"]
    assert [task_filter.identity(json.loads(row.payload)) for row in train] == [one.task for one in band]
    assert [(row.tried, row.right, row.tokens) for row in train] == [(4, one.right, one.tokens) for one in band]
    assert all(row.tried == 0 for row in rows if row.split == "eval")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"task": "00"}', "line 1: "),
        (json.dumps({"task": "0" * 64, "tried": 2, "right": 3, "tokens": 1}), "3 of 2 samples right"),
        (json.dumps({"task": "0" * 64, "tried": 2, "right": 1, "tokens": 1}), "0 training tasks that are in"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, text, words) -> None:
    (tmp_path / "kept.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=words):
        rows_of(settings(tmp_path, run={"name": "bad"}, env={"keep": str(tmp_path / "kept.jsonl")}))


def test_difficulty_is_counted_once_a_step_has_taken_the_groups(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await house.work("ada", 2)
        await house.audit()
        await house.score()
        assert not house.rows(sa.select(TASKS.c.tried).where(TASKS.c.tried > 0))
        await house.step(1)
        lengths = {row.task: row.tokens for row in house.rows(sa.select(TASKS).where(TASKS.c.tried > 0))}
        tried = house.rows(sa.select(TASKS.c.tried, TASKS.c.right).where(TASKS.c.tried > 0))
        assert [tuple(row) for row in tried] == [(4, 2), (4, 2)], "every second sample is right"
        assert sum(lengths.values()) == sum(row.tokens for row in house.rows(sa.select(ROLLOUTS)))

    house.run(scenario)


def test_a_training_reward_is_less_the_farther_its_length_is_from_what_the_prompt_names(tmp_path, make_house) -> None:
    env = {"train_tasks": 64, "lengths": [2, 5], "length_weight": 0.01, "length_prompt": "{tokens} {prompt}"}
    rows = rows_of(settings(tmp_path, run={"name": "long"}, env=env))
    assert {row.target for row in rows} == {2, 5}
    assert all(row.prompt.startswith(f"{row.target} ") for row in rows)

    house = make_house(env={"length_weight": 0.01}, eval={"tasks": 2})

    async def scenario(house) -> None:
        await house.ctx.database.write(lambda c: c.execute(TASKS.update().values(target=9)))
        await house.step(0)
        await house.submit("val-1", await house.lease("val-1"))
        await house.work("ada", 2)
        await house.audit()
        await house.score(lambda rollout: 1.0)
        for row in house.rows(sa.select(ROLLOUTS)):
            is_training = row.node == house.named("ada").id
            assert row.reward == pytest.approx(1.0 - 0.01 * abs(9 - row.tokens) * is_training)
            assert json.loads(row.parts)["length"] == pytest.approx(-0.01 * abs(9 - row.tokens))

    house.run(scenario)
