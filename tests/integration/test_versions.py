"""Versions at the coordinator: differences to the step before only, and shards deleted when nothing needs them."""

from typing import Any

import pytest

from farflung.protocol import messages as m
from farflung.protocol.digest import digest_of
from farflung.protocol.errors import Conflict, NotFound
from farflung.weights import shard_gc

PATH = "/v1/runs/test"


async def put(house: Any, data: bytes) -> m.Shard:
    digest = digest_of(data)
    await (await house.client("trainer")).put(f"{PATH}/blobs/{digest}", data)
    return m.Shard(digest=digest, size_bytes=len(data))


async def ready(house: Any, step: int) -> m.Batch:
    """The batch of a step, with the work for it done."""
    if step:
        await house.work("ada", 2)
        await house.audit()
        await house.score()
    batch = await house.claim_step(step)
    assert batch is not None
    return batch


async def difference(house: Any, step: int, **changes: Any) -> m.Shard:
    """Commit a step as a difference alone."""
    batch = await ready(house, step)
    shard = await put(house, f"difference of {step}".encode())
    await house.commit(batch, **({"base_step": step - 1, "shards": [], "deltas": [shard]} | changes))
    return shard


def test_a_difference_to_anything_but_the_step_before_is_refused(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await difference(house, 1)
        with pytest.raises(Conflict, match="difference to step 0, but its parent is step 1"):
            await difference(house, 2, base_step=0)
        with pytest.raises(Conflict, match="step 1 has other tensors"):
            await difference(house, 2, tensors=[], digest=digest_of(b""))
        await difference(house, 2)

    house.run(scenario)


def test_shards_go_when_nothing_in_use_needs_them(make_house, monkeypatch: pytest.MonkeyPatch) -> None:
    house = make_house(run={"steps": 8}, eval={"tasks": 0}, learn={"max_staleness": 1})
    monkeypatch.setattr(shard_gc, "SPARE_STEPS", 0)

    async def scenario(house) -> None:
        await house.step(0)
        first = await difference(house, 1)
        await house.commit(await ready(house, 2))
        later = await difference(house, 3)
        assert await house.ctx.blobs.size(later.digest)
        await difference(house, 4)
        with pytest.raises(NotFound):
            await house.ctx.blobs.size(first.digest)
        assert await house.ctx.blobs.size(later.digest), "step 4 is reached from the anchor of step 2"
        await difference(house, 5)
        assert await house.ctx.blobs.size(later.digest)

    house.run(scenario)


def test_a_step_that_waits_for_evaluation_keeps_its_shards(make_house, monkeypatch: pytest.MonkeyPatch) -> None:
    house = make_house(run={"steps": 8}, learn={"max_staleness": 1})
    monkeypatch.setattr(shard_gc, "SPARE_STEPS", 0)

    async def scenario(house) -> None:
        for step in range(5):
            await house.commit(await ready(house, step))
        assert await house.ctx.database.read(lambda c: shard_gc.oldest_in_use(c, house.ctx.run_ctx)) == 0

    house.run(scenario)


def test_versions_are_listed_with_their_bytes(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        shard = await difference(house, 1)
        weights = await house.line("eve").get(f"{PATH}/weights", m.Weights)
        assert [(v.step, v.full_bytes, v.delta_bytes, bool(v.anchor_bytes)) for v in weights.versions] == [
            (1, 4, shard.size_bytes, False),
            (0, 4, 0, True),
        ]

    house.run(scenario)
