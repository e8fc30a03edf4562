"""A machine on loan, by its watch's word: the engine ends once, comes back, and is tried again where it cannot."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from farflung.config import IdleSection, WorkerSection
from farflung.config.idle import preferences_in
from farflung.idle import loan as loans
from farflung.idle.decide import Facts
from farflung.idle.loan import Loan
from farflung.idle.lookout import Watch
from farflung.net.session import NodeStats
from farflung.protocol.errors import ConfigError, Unreachable


@dataclass
class Coordinator:
    """That of a session: what it is told, where it is there."""

    stats: NodeStats = field(default_factory=NodeStats)
    held: dict[str, str] = field(default_factory=dict[str, str])
    told: list[str] = field(default_factory=list[str])
    is_away: bool = False

    async def heartbeat(self) -> None:
        """Hear of the node, or be away."""
        if self.is_away:
            await asyncio.sleep(3600)
            raise Unreachable("away")
        self.told.append(self.stats.phase)


class Machine:
    """An owner, an engine, and what became of it."""

    def __init__(self, folder: Path, **rules: Any) -> None:
        self.idle_s, self.did, self.faults, self.is_over = 0.0, list[str](), list[Exception](), False
        self.session: Any = Coordinator()
        self.loan = Loan(IdleSection(), folder, WorkerSection())
        given = IdleSection(when_idle=True, user_idle_s=10, **rules)
        self.watch = self.loan._watch = Watch(given, preferences_in(folder), self.facts)

    def facts(self, rules: IdleSection) -> Facts:
        return Facts(0.0, 100.0, 0.0, user_idle_s=self.idle_s)

    def owner(self, *, is_there: bool) -> None:
        """Comes or goes, and is seen."""
        self.idle_s = 0.0 if is_there else 99.0
        self.watch.poll()

    async def end(self) -> None:
        self.did.append("end")

    async def start(self) -> None:
        if self.faults:
            raise self.faults.pop()
        self.did.append("start")

    def leave(self) -> None:
        self.did.append("leave")
        self.is_over = True

    def waiting(self) -> "asyncio.Task[None]":
        self.loan.bind(self.session, self.end, self.start, self.leave, lambda: self.is_over)
        return asyncio.create_task(self.loan.wait())


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loans, "LOOK_S", 0.001)
    monkeypatch.setattr(loans, "AGAIN_S", 0.005)


def test_a_suspended_node_keeps_its_engine_and_says_why(tmp_path: Path) -> None:
    async def scenario() -> None:
        machine = Machine(tmp_path)
        machine.owner(is_there=True)
        waiting = machine.waiting()
        await asyncio.sleep(0.02)
        assert machine.session.told == ["suspended (user_active)"]
        machine.owner(is_there=False)
        await waiting
        assert machine.did == []

    asyncio.run(scenario())


def test_a_vacated_node_ends_its_engine_once_and_makes_it_again_however_often_that_fails(tmp_path: Path) -> None:
    async def scenario() -> None:
        machine = Machine(tmp_path, vacate_s=0)
        machine.faults = [ConfigError("no room"), RuntimeError("CUDA out of memory")]
        machine.owner(is_there=True)
        waiting = machine.waiting()
        await asyncio.sleep(0.02)
        assert (machine.did, machine.session.stats.phase) == (["end"], "vacated (user_active)")
        machine.owner(is_there=False)
        await asyncio.wait_for(waiting, 5)
        assert machine.did == ["end", "start"]
        await machine.waiting()
        assert machine.did == ["end", "start"]

    asyncio.run(scenario())


def test_memory_is_given_back_also_while_the_coordinator_is_away(tmp_path: Path) -> None:
    async def scenario() -> None:
        machine = Machine(tmp_path, vacate_s=0)
        machine.session.is_away = True
        machine.owner(is_there=True)
        waiting = machine.waiting()
        await asyncio.sleep(0.02)
        assert machine.did == ["end"]
        machine.is_over = True
        await asyncio.wait_for(waiting, 5)
        assert machine.did == ["end"]

    asyncio.run(scenario())


def test_when_time_is_up_the_node_leaves(tmp_path: Path) -> None:
    async def scenario() -> None:
        machine = Machine(tmp_path, ends_at=99.0)
        machine.owner(is_there=False)
        await asyncio.wait_for(machine.waiting(), 5)
        assert machine.did == ["leave"]

    asyncio.run(scenario())


def test_memory_is_given_back_once_the_other_lane_has_handed_in(tmp_path: Path) -> None:
    async def scenario() -> None:
        machine = Machine(tmp_path, vacate_s=0)
        machine.session.held["l1"] = "the other lane's"
        machine.owner(is_there=True)
        waiting = machine.waiting()
        await asyncio.sleep(0.02)
        assert machine.did == []
        machine.session.held.clear()
        machine.session.stats.phase = "submitting"
        await asyncio.sleep(0.02)
        assert (machine.did, machine.session.stats.phase) == (["end"], "vacated (user_active)")
        machine.owner(is_there=False)
        await asyncio.wait_for(waiting, 5)

    asyncio.run(scenario())
