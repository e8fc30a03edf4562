"""A node that joins says whether the run fits this machine before it fetches anything of it."""

import asyncio
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("torch")

from farflung.config import WorkerSection
from farflung.net.session import hardware
from farflung.ops.doctor import examine
from farflung.protocol.errors import WeightsError
from farflung.protocol.identity import Key
from farflung.protocol.messages import VERSION, Hardware, Register, Status, Welcome
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

    found = asyncio.run(findings(device="cpu"))
    assert "computes in" in found["device"].text
    assert "speed" in found, [one.text for one in found.values() if not one.is_well]
    assert found["speed"].figure > 0
    assert "expected, as measured" in found["speed"].text
    enough, little = found["room"], asyncio.run(findings(memory_gb=1e-4))["room"]
    assert enough.is_well
    assert "64 rollouts of" in enough.text
    assert not little.is_well
    assert "what would fit" in little.text


def test_a_device_that_is_not_there_is_a_finding(tmp_path) -> None:
    async def found():
        return {one.what: one async for one in examine("", tmp_path, None, WorkerSection(device="cuda:9"))}

    device = asyncio.run(found())["device"]
    assert not device.is_well
    assert "--device" in device.mend


def test_people_see_what_a_node_says_of_its_machine_and_nothing_of_it_is_obeyed(served) -> None:
    from tests.conftest import named

    said = hardware("NVIDIA H100 (cuda:0)", 80 * 2**30, "CUDA 13.0, <b>driver</b>\x1b[31m", "bfloat16", 1234.5)
    assert not {"<", "\x1b"} & set(said.driver)

    async def register() -> Status:
        client = served.house.line("w1")
        try:
            await client.post("/v1/nodes", Register(version=VERSION, hardware=said), Welcome)
            return await client.get(f"/v1/runs/{served.house.ctx.run_ctx.run}/status", Status)
        finally:
            await client.close()

    status = asyncio.run(register())
    view = next(node for node in status.nodes if node.node == named("w1").id)
    for part in ("NVIDIA H100 (cuda:0)", "80 GiB", "bfloat16", "CUDA 13.0", "1,234 tok/s expected"):
        assert part in view.hardware


@pytest.mark.parametrize("field", [{"driver": "x" * 81}, {"driver": "\x1b"}, {"expected_tokens_per_s": -1.0}])
def test_a_boast_beyond_bounds_is_no_message(field) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(field, Hardware)
