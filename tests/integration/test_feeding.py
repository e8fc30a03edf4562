"""A worker that takes its next lease while the present one is under way, so that its server's batch never drains."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch")
import sqlalchemy as sa
from tests import conftest
from tests.conftest import BASE, House, named
from tests.served import Served

from farflung.config import WorkerSection
from farflung.engine.local import LocalEngine
from farflung.protocol import messages as m
from farflung.store.tables import LEASES, ROLLOUTS
from farflung.trust.evidence import Profiles
from farflung.worker import Worker
from publishing import publish_base
from vllm_server import StandIn, vllm_server

SLOTS, SAMPLES, ROLLOUT_S = 2, 4, 0.1
"""Rollouts at once, in a lease, and how long one takes."""
LEASES_MADE = 5


class Site(Served):
    """A coordinator on a socket that trusts ada, and a vLLM server for her worker."""

    def __init__(self, house: House, server: StandIn, folder: Path) -> None:
        super().__init__(house)
        self.server, self._folder = server, folder
        server.clock, server.rollout_s = house.clock, ROLLOUT_S

    def new_worker(self) -> Worker:
        settings = WorkerSection(engine="vllm", engine_url=self.server.url, slots=SLOTS)
        return Worker(self.url, named("ada"), self._folder, settings, name="ada")

    async def begin(self) -> None:
        await publish_base(self.house, BASE)
        said = m.Register(version=m.VERSION, name="ada", profile=conftest.PROFILE.run.name, engine="vllm", device="cpu")
        await (await self.house.client("ada")).post("/v1/nodes", said, m.Welcome)  # another would begin on probation
        await self.house.make_trusted("ada")
        self._began = self.house.clock()

    @asynccontextmanager
    async def working(self) -> AsyncIterator[Worker]:
        """While a worker runs; it must end well when it is told to."""
        worker = self.new_worker()
        running = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            worker.drain()
            await running

    async def until(self, is_so: Callable[[], Any]) -> None:
        async with asyncio.timeout(60):
            while not is_so():
                await asyncio.sleep(0.01)

    def leases(self, *statuses: str) -> list[Any]:
        """Those of the worker itself, oldest first."""
        rows = self.house.rows(sa.select(LEASES).where(LEASES.c.opened_at > self._began).order_by(LEASES.c.opened_at))
        return [row for row in rows if not statuses or row.status in statuses]

    def rollouts(self, lease: Any) -> Counter[str]:
        return self.house.statuses(ROLLOUTS, lease=lease.lease)

    async def judge(self) -> None:
        """Audit and score all that was handed in."""
        await self.house.audit()
        await self.house.score()


@pytest.fixture
def site(make_house, tmp_path: Path, monkeypatch) -> Iterator[Site]:
    monkeypatch.setattr(conftest, "PROFILE", Profiles(msgspec.structs.replace(conftest.PROFILE.run, engine="vllm")))
    lease = {"rollouts": SAMPLES, "heartbeat_s": 0.05, "max_lag": 0, "ahead": 16}
    house = make_house(lease=lease, trust={"self_test": 0, "canaries": 0})
    with vllm_server(LocalEngine.from_folder(BASE)) as server:
        found = Site(house, server, tmp_path / "ada")
        yield found
        found.close()


def test_the_batch_never_drains_between_two_leases_and_all_rollouts_are_accepted(site: Site) -> None:
    """Rollouts end one by one, and none before another is there, however long a lease takes to come."""

    async def scenario(house: House) -> None:
        await site.begin()
        server, count = site.server, LEASES_MADE * SAMPLES
        server.stuck = set(range(2 * count))
        async with site.working():
            for number in range(count):
                await site.until(lambda: server.under_way > 1)
                server.stuck.discard(number)
                await site.until(lambda number=number: server.finished > number)
            await site.until(lambda: len(site.leases("submitted")) == LEASES_MADE)
            assert server.idle_moments == 0
        await site.judge()
        assert {one.device for one in site.leases()} == {0, 1}
        made = site.leases()[:LEASES_MADE]
        assert [one.status for one in made] == ["submitted"] * LEASES_MADE
        assert [site.rollouts(one) for one in made] == [{"accepted": SAMPLES}] * LEASES_MADE

    site.house.run(scenario)


def test_draining_hands_in_what_is_complete_of_both(site: Site) -> None:
    async def scenario(house: House) -> None:
        await site.begin()
        site.server.stuck = {3, 6}
        async with site.working() as worker:
            await site.until(lambda: site.server.finished == 2 * (SAMPLES - 1) and worker.engine.under_way == SLOTS)
            assert len(worker.session.held) == 2
            assert len(site.leases()) == 2, "no third while there is no room"
        await site.judge()
        assert [one.status for one in site.leases()] == ["submitted"] * 2
        assert all(one.is_partial for one in site.leases())
        assert all(site.rollouts(one) == {"accepted": 3, "expired": 1} for one in site.leases())

    site.house.run(scenario)


def test_a_lease_of_another_version_waits_until_the_one_before_is_handed_in(site: Site) -> None:
    async def scenario(house: House) -> None:
        await site.begin()
        site.server.stuck = {SAMPLES - 1}
        async with site.working() as worker:
            await site.until(lambda: len(site.leases("submitted")) >= 3)
            await site.judge()
            await publish_base(house, BASE, step=1)
            await site.until(lambda: any(one.step == 1 for one in site.leases("open")))
            begun = site.server.begun
            await asyncio.sleep(5 * ROLLOUT_S)
            assert (site.server.begun, site.server.under_way, len(worker.session.held)) == (begun, 1, 2)
            site.server.stuck.clear()
            await site.until(lambda: any(one.step == 1 for one in site.leases("submitted")))
        await site.judge()
        first = site.leases()[0]
        [second, *_] = [one for one in site.leases() if one.step == 1]
        assert (first.step, first.status) == (0, "submitted")
        assert [site.rollouts(one) for one in (first, second)] == 2 * [{"accepted": SAMPLES}]

    site.house.run(scenario)


def test_leases_whose_worker_was_killed_are_given_to_the_next_again(site: Site) -> None:
    async def scenario(house: House) -> None:
        await site.begin()
        site.server.stuck = {3, 6}
        killed = asyncio.create_task(site.new_worker().run())
        await site.until(lambda: site.server.under_way == SLOTS and len(site.leases()) == 2)
        killed.cancel()
        await asyncio.gather(killed, return_exceptions=True)
        assert [one.status for one in site.leases()] == ["open"] * 2
        site.server.stuck = set()
        async with site.working():
            await site.until(lambda: [one.status for one in site.leases()[:2]] == ["submitted"] * 2)
        await site.judge()
        assert all(site.rollouts(one) == {"accepted": SAMPLES} for one in site.leases()[:2])

    site.house.run(scenario)
