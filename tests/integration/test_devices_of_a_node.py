"""A node of several devices: a lease for each, one cache for all, and bounds on what it may say it has."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration.test_deltas import run
from tests.integration.test_deltas import small_shards as small_shards

from farflung.config import WorkerSection
from farflung.ops.several import devices, parts
from farflung.protocol import messages as m
from farflung.protocol.errors import ConfigError, Forbidden
from farflung.weights.cache import Versions
from farflung.weights.patch import patch
from farflung.weights.sharing import Sharing
from following import same
from standin import session_with


async def register(house, name: str, count: int) -> None:
    client = await house.client(name)
    said = m.Register(version=m.VERSION, name=name, hardware=m.Hardware(devices=count))
    await client.post("/v1/nodes", said, m.Welcome)


async def trusted(house, name: str, count: int) -> None:
    """A worker that has gone through probation, and says how many devices it has."""
    await house.step(0)
    await house.work(name)
    await house.audit()
    await register(house, name, count)


def test_each_device_of_a_trusted_node_has_a_lease_of_its_own_and_gets_it_again(house) -> None:
    async def scenario(house) -> None:
        await trusted(house, "w1", 2)
        first, second = await house.lease("w1", device=0), await house.lease("w1", device=1)
        assert first.lease != second.lease
        assert not samples(first) & samples(second)
        assert (await house.lease("w1", device=1)).lease == second.lease
        await house.submit("w1", first)
        third = await house.lease("w1", device=0)
        assert third.lease not in (first.lease, second.lease)
        await house.submit("w1", second)
        await house.submit("w1", third)

    house.run(scenario)


def samples(lease: m.Lease) -> set[str]:
    return {sample.rollout for group in lease.groups for sample in group.samples}


def test_devices_that_ask_at_once_are_told_apart(house) -> None:
    async def scenario(house) -> None:
        await trusted(house, "w1", 3)
        found = await asyncio.gather(*(house.lease("w1", device=number % 3) for number in range(6)))
        assert len({lease.lease for lease in found}) == 3

    house.run(scenario)


@pytest.mark.parametrize(("said", "allowed", "fits"), [(1, 16, 1), (64, 2, 2), (1, 1, 1)])
def test_two_leases_a_device_up_to_what_is_allowed_and_no_third(make_house, said, allowed, fits) -> None:
    most = min(allowed, 2)

    async def scenario(house) -> None:
        await trusted(house, "w1", said)
        found = [await house.lease("w1", device=number) for number in range(most)]
        assert len({lease.lease for lease in found}) == most
        with pytest.raises(Forbidden, match=f"may hold {most}; join with --processes {fits}"):
            await house.ask("w1", device=most)

    make_house(lease={"devices": allowed, "rollouts": 4}).run(scenario)


def test_a_node_on_probation_has_one_lease_whatever_it_declares(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await register(house, "w1", 8)
        found = await asyncio.gather(*(house.ask("w1", device=number) for number in range(8)))
        assert sum(lease is not None for lease in found) == 1
        assert sum([await house.ask("w1", device=number) is not None for number in range(8)]) == 1

    house.run(scenario)


# --- the folder of weights -------------------------------------------------------------------------------------------


def test_two_that_share_a_folder_fetch_each_shard_once_and_keep_what_the_other_wants(tmp_path) -> None:
    async def scenario() -> None:
        async with run(steps=4) as trainer, session_with(trainer.client.url) as session:
            one, two = (Versions(session, tmp_path, keep=1, patch=patch, share=number) for number in (0, 1))
            for wanted in trainer.digests[:2]:
                await asyncio.gather(one.fetch(wanted), two.fetch(wanted))
            await one.fetch(trainer.digests[3])
            assert len(trainer.origin.sent) == len(set(trainer.origin.sent)), "none was asked for twice"
            assert same(two, trainer, 1), "it is the other's still"
            assert same(one, trainer, 3)
            await two.fetch(trainer.digests[3])
            assert len(trainer.origin.sent) == len(set(trainer.origin.sent))
            assert not two.whole(trainer.digests[1]).exists(), "and goes once neither wants it"
            assert same(two, trainer, 3)
            await one.close()
            await two.close()

    asyncio.run(scenario())


HOLD = """
import sys, time
from pathlib import Path
from farflung.weights.sharing import Sharing
sharing = Sharing(Path(sys.argv[1]), 0)
sharing.want(["a", "b"])
assert sharing.try_alone()
print("has it", flush=True)
time.sleep(60)
"""


def test_a_process_that_is_killed_holds_up_no_other(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "has it\n"
    mine = Sharing(tmp_path, 1)
    assert mine.wanted_by_others() == {"a", "b"}
    assert not mine.try_alone()
    with pytest.raises(ConfigError, match="another process is part 0"):
        Sharing(tmp_path, 0)
    os.kill(other.pid, signal.SIGKILL)
    other.communicate()
    assert mine.wanted_by_others() == set()
    assert mine.try_alone()
    mine.close()


# --- the processes ---------------------------------------------------------------------------------------------------


def test_processes_are_as_many_as_asked_for_else_one_on_each_accelerator(tmp_path) -> None:
    pytest.importorskip("torch")
    assert devices(WorkerSection(device="cpu")) == ["cpu"]
    assert devices(WorkerSection(device="cpu", processes=3)) == ["cpu"] * 3
    found = parts("http://x", tmp_path, WorkerSection(device="cpu", processes=2, metrics_port=9000), {}, is_json=False)
    assert [(one.number, one.settings.metrics_port) for one in found] == [(0, 9000), (1, 9001)]
    assert {one.settings.processes for one in found} == {2}
    with pytest.raises(ConfigError, match="not there"):
        devices(WorkerSection(device="cuda:7", processes=2))
