"""A worker whose vLLM server is slow, dies or is away: half an hour goes by as fast as a test turns the clock."""

import asyncio
import threading
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
from farflung.engine import vllm
from farflung.engine.local import LocalEngine
from farflung.protocol.errors import ConfigError
from farflung.rollouts.lanes import AWAY_S
from farflung.store.tables import LEASES, ROLLOUTS
from farflung.trust.evidence import Profiles
from farflung.worker import Worker
from publishing import publish_base
from vllm_server import StandIn, vllm_server

LEASE_S, TURN_S, SLOTS = 300.0, 45.0, 2
HALF_AN_HOUR_S = 1800.0


class Site(Served):
    """A coordinator on a socket, a vLLM server whose rollouts take long by the same clock, and a worker with it."""

    def __init__(self, house: House, server: StandIn, folder: Path) -> None:
        super().__init__(house)
        self.server, server.clock = server, house.clock
        server.seats = threading.Semaphore(SLOTS)
        settings = WorkerSection(engine="vllm", engine_url=server.url, slots=SLOTS)
        self.worker = Worker(self.url, named("ada"), folder, settings, name="ada")
        self.worker.client.clock = house.clock

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """While the worker runs; it must end well when it is told to."""
        await publish_base(self.house, BASE)
        running = asyncio.create_task(self.worker.run())
        while "loaded" not in vars(self.worker):  # it joins
            await asyncio.wait([running], timeout=0.01)
            if running.done():
                running.result()
        try:
            yield
        finally:
            self.worker.drain()
            await self.until(running.done)
            running.result()

    async def until(self, is_so: Callable[[], Any]) -> None:
        """Turn the clock until it is so, but not while the worker is at something that takes no time by it."""
        while not is_so():
            self.house.clock.now += TURN_S
            turned_at = self.house.clock()
            await asyncio.sleep(0.01)
            while not (self._waits_for_time(turned_at) or is_so()):
                await asyncio.sleep(0.01)

    def _waits_for_time(self, turned_at: float) -> bool:
        session, is_slow = self.worker.session, self.server.rollout_s and not self.server.is_dead
        if session.stats.phase == "generating" and is_slow:
            return (
                min(one.lapses_at for one in session.held.values()) > turned_at + 0.7 * LEASE_S
            )  # it has heard since of a lease that lasts on
        has_lease = self.house.statuses(LEASES)["open"] > 0
        return session.stats.phase in ("waiting for its engine", "gone") or not has_lease

    def leases(self) -> list[Any]:
        return list(self.house.rows(sa.select(LEASES).order_by(LEASES.c.opened_at)))

    def of_first(self) -> Counter[str]:
        """What became of the rollouts of the first lease."""
        return self.house.statuses(ROLLOUTS, lease=self.leases()[0].lease)


@pytest.fixture
def site(make_house, tmp_path: Path, monkeypatch) -> Iterator[Site]:
    monkeypatch.setattr(vllm, "_COUNT_S", 0.02)
    monkeypatch.setattr(conftest, "PROFILE", Profiles(msgspec.structs.replace(conftest.PROFILE.run, engine="vllm")))
    lease = {"lease_s": LEASE_S, "slowest_tokens_per_s": 0.002, "heartbeat_s": 0.05, "lost_s": 4 * TURN_S}
    lease |= {"devices": 1}  # one lease at a time, so that nothing is asked while the clock is turned
    house = make_house(lease=lease, trust={"self_test": 0, "canaries": 0})
    with vllm_server(LocalEngine.from_folder(BASE)) as server:
        found = Site(house, server, tmp_path / "ada")
        yield found
        found.close()


def test_a_rollout_of_half_an_hour_in_a_lease_of_five_minutes_loses_nothing(site: Site) -> None:
    async def scenario(house: House) -> None:
        site.server.rollout_s = HALF_AN_HOUR_S
        async with site.working():
            await site.until(lambda: site.leases() and site.leases()[0].status != "open")
            site.server.rollout_s = 0.0
        first = site.leases()[0]
        assert first.status == "submitted"
        assert not first.is_partial
        assert site.of_first() == {"held": 4}
        assert first.expires_at - first.opened_at > 2 * HALF_AN_HOUR_S, "two at a time, two waves"

    site.house.run(scenario)


def test_a_server_with_another_noise_ends_the_worker_before_it_takes_a_lease(site: Site) -> None:
    async def scenario(house: House) -> None:
        site.server.flaws.noise = "another"
        await publish_base(site.house, BASE)
        with pytest.raises(ConfigError, match="another noise"):
            await site.worker.run()
        assert not site.leases()
        assert site.server.rollouts == 0

    site.house.run(scenario)


def test_a_server_killed_in_mid_lease_costs_what_it_had_not_finished(site: Site) -> None:
    async def scenario(house: House) -> None:
        site.server.rollout_s = HALF_AN_HOUR_S
        async with site.working():
            engine = site.worker.engine
            await site.until(lambda: site.leases() and site.server.finished == SLOTS and site.server.under_way == SLOTS)
            site.server.is_dead = True
            await site.until(lambda: site.leases()[0].status != "open")
            assert site.of_first() == {"held": 2, "expired": 2}
            await site.until(lambda: site.worker.session.stats.phase == "waiting for its engine")
            site.server.rollout_s = 0.0
            site.server.start_again()
            unsent = {row.sample for row in house.rows(sa.select(ROLLOUTS)) if row.status == "expired"}
            await site.until(lambda: made_again(house) >= unsent)
            assert site.worker.engine is engine
        assert site.leases()[0].is_partial

    site.house.run(scenario)


def made_again(house: House) -> set[int]:
    """Samples of the first group that are handed in."""
    first = house.rows(sa.select(ROLLOUTS.c.group).order_by(ROLLOUTS.c.rollout))
    rows = house.rows(sa.select(ROLLOUTS).where(ROLLOUTS.c.group.in_([row.group for row in first])))
    return {row.sample for row in rows if row.status == "held" and row.is_reissue}


def test_an_engine_that_is_away_is_waited_for_and_costs_no_lease(site: Site) -> None:
    async def scenario(house: House) -> None:
        async with site.working():
            await site.until(lambda: len(site.leases()) > 1)
            site.server.is_dead = True
            waits = set[float]()

            def is_waiting() -> bool:
                waits.add(site.worker.lanes.away_s)
                return len(waits) > 3

            await site.until(is_waiting)
            assert min(waits) == AWAY_S
            assert all(2 * wait in waits for wait in sorted(waits)[:-1]), "longer each time"
            given_back = [lease for lease in site.leases() if lease.status == "returned"]
            assert len(given_back) >= 3
            assert house.statuses(LEASES)["expired"] == 0
            site.server.start_again()
            before = house.statuses(LEASES)["submitted"]
            await site.until(lambda: house.statuses(LEASES)["submitted"] > before)
            await site.until(lambda: site.worker.lanes.away_s == AWAY_S)

    site.house.run(scenario)
