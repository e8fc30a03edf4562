"""A node with a vLLM server of its own: vacated, the server ends; when the owner is gone, another one is started."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

pytest.importorskip("torch")
pytest.importorskip("jeepney")
from tests import conftest
from tests.conftest import House, named
from tests.integration.test_vllm_process import home as home
from tests.served import Served

from farflung.config import IdleSection, WorkerSection
from farflung.store.tables import NODES
from farflung.trust.evidence import Profiles
from farflung.worker import Worker
from system_bus import FakeBus
from system_bus import system_bus as system_bus

RULES = IdleSection(
    when_idle=True, user_idle_s=2, cpu_percent=100, vacate_s=0, poll_s=0.1, on_battery=True, on_metered=True, hot_c=0
)
WAIT_S = 120.0


@pytest.fixture
def site(make_house, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    numerics = {"engine": "vllm", "arithmetic": "bfloat16", "bits": 16}
    monkeypatch.setattr(conftest, "PROFILE", Profiles(msgspec.structs.replace(conftest.PROFILE.run, **numerics)))
    found = Served(make_house(trust={"self_test": 0, "canaries": 0}, lease={"heartbeat_s": 0.2, "lost_s": 40.0}))
    yield found
    found.close()


async def until(is_so: Callable[[], Any], running: asyncio.Task[None]) -> None:
    """Wait while the worker runs."""
    end_s = time.monotonic() + WAIT_S
    while not is_so():
        if running.done():
            running.result()
        assert time.monotonic() < end_s
        await asyncio.sleep(0.02)


def servers() -> list[psutil.Process]:
    """Stand-ins that this process started."""
    return [one for one in psutil.Process().children(recursive=True) if "vllm_main.py" in " ".join(one.cmdline())]


@pytest.mark.timeout(300)
def test_a_server_of_the_nodes_own_ends_with_the_loan_and_another_one_is_started(
    site: Served, home: Path, system_bus: FakeBus, tmp_path: Path
) -> None:
    system_bus.set_idle(60.0)
    settings = WorkerSection(engine="vllm", engine_home=str(home), slots=2, device="cpu")
    worker = Worker(site.url, named("ada"), tmp_path / "ada", settings, name="ada", idle=RULES)

    async def scenario(house: House) -> None:
        def phase() -> str:
            return house.row(NODES, named("ada").id).phase

        running = asyncio.create_task(worker.run())
        await until(lambda: hasattr(worker, "loaded") and phase() == "waiting", running)
        first = servers()
        assert first
        system_bus.set_idle(None)
        await until(lambda: not any(one.is_running() for one in first), running)
        await until(lambda: phase() == "vacated (user_active)", running)
        assert servers() == []
        system_bus.set_idle(60.0)
        await until(lambda: hasattr(worker, "loaded") and phase() == "waiting", running)
        assert servers()
        worker.drain()
        await asyncio.wait_for(running, 30)
        assert servers() == []

    site.house.run(scenario)
