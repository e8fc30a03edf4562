"""What a run tells when its environment cannot score, or nothing can be learned, or it cannot go on."""

import json
from dataclasses import replace

import pytest
import sqlalchemy as sa
from tests.conftest import settings
from tests.integration.test_tasks import rows_of

from farflung.audits.unused import drop_groups
from farflung.protocol.errors import ConfigError
from farflung.queries.views import warnings
from farflung.rollouts import unscorable
from farflung.store.db import Database
from farflung.store.tables import GROUPS, RUNS
from farflung.tasks.create_run import founded_in, refuse_another


async def warned(house) -> list[str]:
    return await house.ctx.database.read(warnings)


def test_the_first_fault_is_told_and_so_is_that_nothing_can_be_scored(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        known = await warned(house)
        run_ctx = house.ctx.run_ctx
        for number in range(3):
            await house.ctx.database.write(
                lambda c, number=number: unscorable.tell_fault(
                    c, run_ctx, "r1", f"environment 'sums': KeyError: 'terms' at {number}", 1.0
                )
            )
        for _ in range(unscorable.MOST_UNSCORED):
            await house.ctx.database.write(
                lambda c: unscorable.count_unscored(c, run_ctx, "r1", "environment 'sums': KeyError: 'terms' at 1", 1.0)
            )
        first, last = [text for text in await warned(house) if text not in known]
        assert first == "a rollout could not be scored: environment 'sums': KeyError: 'terms' at 0"
        with pytest.raises(ConfigError, match=r"none of the first rollouts .* KeyError: 'terms' .* --resume"):
            unscorable.refuse_unscorable([first, last], known)
        unscorable.refuse_unscorable([first, last], [last])

    house.run(scenario)


def test_whoever_sends_texts_that_cannot_be_scored_ends_no_run(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await house.work("ada")
        await house.audit()
        assert await house.score() > 0
        known = await warned(house)
        for _ in range(3 * unscorable.MOST_UNSCORED):
            await house.ctx.database.write(
                lambda c: unscorable.count_unscored(c, house.ctx.run_ctx, "r1", "environment 'sums': KeyError", 1.0)
            )
        assert await warned(house) == known

    house.run(scenario)


@pytest.mark.parametrize(("reward", "words"), [(0.0, "every answer earned 0;"), (1.0, "every answer earned 1;")])
def test_a_first_step_of_equal_rewards_is_told(make_house, reward, words) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        while (batch := await house.claim_step(1)) is None:
            await house.work("ada")
            await house.audit()
            await house.score(lambda rollout: reward)
        assert not batch.groups
        (said,) = [text for text in await warned(house) if "nothing could be learned from step 1" in text]
        assert words in said

    make_house(learn={"groups": 1, "oversample": 2.0}).run(scenario)


def test_a_step_takes_what_there_is_once_every_task_was_tried_and_some_were_let_go(make_house) -> None:
    """Else a run whose environment cannot score some of its few tasks would wait for ever."""

    async def scenario(house) -> None:
        await house.step(0)
        run_ctx = house.ctx.run_ctx
        await house.work("ada", times=3)
        assert await house.audit()
        assert await house.claim_step(1) is None
        lost = await house.ctx.database.read(lambda c: c.execute(sa.select(GROUPS.c.group).limit(1)).scalar_one())
        await house.ctx.database.write(lambda c: drop_groups(c, run_ctx, [lost], 1.0, why="nobody may do it"))
        assert await house.claim_step(1) is None, "two groups are still to be scored"
        await house.score()
        batch = await house.claim_step(1)
        assert (len(batch.groups), batch.seen_groups) == (2, 2)
        assert lost not in {group.group for group in batch.groups}

    house = make_house(learn={"groups": 3, "oversample": 1.0})
    house.ctx.run_ctx = replace(house.ctx.run_ctx, tasks=house.ctx.run_ctx.tasks[:3])
    house.run(scenario)


@pytest.mark.parametrize(
    ("learn", "need"),
    [({"groups": 3, "oversample": 1.5}, 3), ({"groups": 2, "lockstep": True, "max_staleness": 2}, 6)],
)
def test_fewer_tasks_than_a_step_waits_for_are_refused(tmp_path, learn, need) -> None:
    few = settings(tmp_path, run={"name": "few"}, env={"train_tasks": need - 1}, learn=learn)
    with pytest.raises(ConfigError, match=f"has {need - 1} training tasks; a step needs {need}, each once"):
        rows_of(few)
    assert rows_of(settings(tmp_path, run={"name": "enough"}, env={"train_tasks": need}, learn=learn))


def test_a_run_goes_on_only_with_its_environment_and_model(tmp_path) -> None:
    config = settings(tmp_path, env={"name": "sums", "args": {"digits": 2}}, model={"path": "/here/tiny"})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    founded = founded_in(tmp_path)
    refuse_another(founded, config)
    refuse_another(founded, settings(tmp_path, env=config.env.model_dump(), model={"path": "/there/tiny"}))
    for changes, words in (
        ({"env": {"name": "reasoning_gym:gcd"}}, "env.name = 'sums' and cannot go on with 'reasoning_gym:gcd'"),
        ({"env": {"name": "sums", "args": {"digits": 3}}}, "env.args"),
        ({"env": config.env.model_dump(), "model": {"path": "/here/big"}}, "model.path = '/here/tiny'"),
    ):
        with pytest.raises(ConfigError, match=words):
            refuse_another(founded, settings(tmp_path, **{"model": {"path": "/here/tiny"}, **changes}))
    (tmp_path / "config.json").write_text("{")
    assert founded_in(tmp_path) == {}


def test_a_run_that_began_with_another_noise_does_not_go_on(tmp_path) -> None:
    config = settings(tmp_path, run={"name": "old"})
    rows_of(config)
    rows_of(config)
    engine = sa.create_engine(config.database_url)
    with engine.begin() as connection:
        connection.execute(sa.update(RUNS).values(noise="farflung"))
    engine.dispose()
    with pytest.raises(ConfigError, match=r"noise 'farflung', this version of farflung with 'vllm-murmur3'.*export"):
        rows_of(config)


def test_a_run_without_held_out_tasks_says_so(tmp_path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"question": "2+3=", "answer": "5"}))
    config = settings(tmp_path, env={"name": str(path)}, learn={"groups": 1, "oversample": 1.0})
    assert [row.split for row in rows_of(config)] == ["train"]
    database = Database(config.database_url)
    with database.engine.connect() as connection:
        (said,) = warnings(connection)
    database.close()
    assert "one.jsonl is held out" in said
