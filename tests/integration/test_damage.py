"""What a disk has damaged while nobody looked: a run that is opened again finds it and has it made again."""

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa
from tests.integration.test_versions import difference, ready

from farflung.coordinator import damage
from farflung.queries.views import warnings
from farflung.store.blobs import Blobs
from farflung.store.tables import BALANCES, GROUPS, ROLLOUTS


def zero(url: str, digest: str) -> None:
    """As after a power cut: the length is right, the bytes are not."""
    (path,) = Path(urlsplit(url).path).rglob(digest)
    path.write_bytes(bytes(path.stat().st_size))


async def warned(house: Any) -> list[str]:
    return await house.ctx.database.read(warnings)


def balances(house: Any) -> list[Any]:
    return house.rows(sa.select(BALANCES).order_by(*BALANCES.primary_key))


async def open_again(house: Any) -> list[str]:
    """What a coordinator does as it starts; gives what it warns of."""
    ctx, before = house.ctx, await warned(house)
    await damage.mend(ctx.database, ctx.run_ctx, ctx.blobs, ctx.archive.blobs, house.clock())
    return [text for text in await warned(house) if text not in before]


def test_nothing_is_done_where_nothing_is_damaged(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await difference(house, 1)
        await house.work("ada")
        assert await open_again(house) == []

    house.run(scenario)


def test_lost_weights_are_published_again_and_work_that_needs_them_is_let_go(make_house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        shard = await difference(house, 1)
        await house.work("ada")
        zero(house.config.blobs_url, shard.digest)
        (said,) = await open_again(house)
        assert "a part of the weights of step 1 is damaged" in said
        assert "step 2 publishes the latest weights again" in said
        assert not house.rows(sa.select(GROUPS).where(GROUPS.c.step == 1, GROUPS.c.status.in_(("open", "complete"))))
        assert await house.ask("ada") is None
        batch = await house.claim_step(2)
        assert (batch.restores, batch.groups) == (1, [])
        await house.commit(batch)
        assert await open_again(house) == [], "the new anchor needs none of what is damaged"
        await house.commit(await ready(house, 3))

    make_house(run={"steps": 9}).run(scenario)


def test_a_run_that_has_ended_is_not_begun_again_for_its_weights(make_house, caplog) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        shard = await difference(house, 1)
        zero(house.config.blobs_url, shard.digest)
        assert await open_again(house) == []
        assert "resume it with more --run.steps" in caplog.text

    make_house(run={"steps": 1}).run(scenario)


@pytest.mark.parametrize("state", ["received", "accepted", "batched"])
def test_lost_submissions_are_leased_again_and_their_makers_keep_the_pay(make_house, state) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await house.make_trusted("ada")
        await house.work("ada", 3)
        await house.audit()
        if state != "received":
            await house.score()
        batch = await house.claim_step(1) if state == "batched" else None
        assert batch is None or batch.groups
        row = house.rows(sa.select(ROLLOUTS).where(ROLLOUTS.c.status == state))[0]
        zero(house.config.submissions_url, row.submission)
        paid = balances(house)
        (said,) = await open_again(house)
        assert "damaged or missing in the blob store are made again (1)" in said
        assert house.row(ROLLOUTS, row.rollout).status == "void"
        assert house.row(GROUPS, row.group).status == "open"
        assert balances(house) == paid
        while (batch := await house.claim_step(1)) is None:
            await house.work("bob")
            await house.audit()
            await house.score()
        assert row.submission not in {one.submission for group in batch.groups for one in group.rollouts}

    make_house(learn={"groups": 2}).run(scenario)


def test_a_shared_store_is_not_read_through(house, monkeypatch) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        shard = await difference(house, 1)
        zero(house.config.blobs_url, shard.digest)
        monkeypatch.setattr(Blobs, "is_shared", True)
        assert await open_again(house) == []

    house.run(scenario)
