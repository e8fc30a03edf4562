"""A node that joins says whether the run fits this machine before it fetches anything of it."""

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("torch")

from farflung.config import WorkerSection
from farflung.ops.doctor import examine
from farflung.protocol.errors import WeightsError
from farflung.protocol.identity import Key
from farflung.worker import Worker
from served import Served


@pytest.fixture
def served(make_house):
    found = Served(make_house())
    yield found
    found.close()


async def open_worker(served: Served, folder: Path, **settings) -> Worker:
    worker = Worker(served.url, Key.make(), folder, WorkerSection(**settings))
    try:
        await worker.open()
        await worker.weights.close()
    finally:
        await worker.client.close()
    return worker


def test_a_worker_chooses_its_rollouts_at_once_or_keeps_what_it_is_told(served, tmp_path) -> None:
    assert asyncio.run(open_worker(served, tmp_path)).slots == 64
    told = asyncio.run(open_worker(served, tmp_path, slots=5))
    assert told.slots == told.engine.max_rows == 5


def test_a_worker_without_room_refuses_with_nothing_fetched(served, tmp_path) -> None:
    with pytest.raises(WeightsError, match=r"what would fit: .* GB to give"):
        asyncio.run(open_worker(served, tmp_path, memory_gb=1e-4))
    assert not (tmp_path / "weights").exists()


def test_doctor_tells_the_room_or_what_would_fit(served, tmp_path) -> None:
    async def findings(**settings):
        found = examine(served.url, tmp_path, None, WorkerSection(**settings), is_joining=True)
        return {one.what: one async for one in found}

    enough, little = (asyncio.run(findings(**settings))["room"] for settings in ({}, {"memory_gb": 1e-4}))
    assert enough.is_well
    assert "64 rollouts of" in enough.text
    assert not little.is_well
    assert "what would fit" in little.text
