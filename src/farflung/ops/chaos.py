"""`farflung chaos`: a swarm on this machine, faults on a seeded schedule, and what each of them cost.

The same run without faults comes first. Throughput is accepted tokens ÷ (the workers' pace × the time they were alive):
a dead machine is nobody's fault, but work that dies with it, is waited for or done twice is.
"""

import asyncio
import contextlib
import os
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import psutil
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table
from sqlalchemy import Connection

from farflung.config import Config
from farflung.ops.faults import LASTS_S, SKEW_S, Fault, Link, full_disk, schedule
from farflung.ops.invariants import violations
from farflung.ops.screen import Screen
from farflung.ops.swarm import Swarm, prepare
from farflung.protocol.errors import ConfigError
from farflung.protocol.messages import Status
from farflung.store.db import open_engine
from farflung.store.tables import EVENTS, GROUPS, LEASES, ROLLOUTS, STEPS

WARM_UP_S = 12.0
BASELINE_SHARE = 0.25
WATCH_S = 0.02
WAITED_S = 60.0
SUCCESS = {"trainer": ("step", "committed"), "validator": ("audit", "done"), "scorer": ("rollout", "accepted")}
"""What shows that a role does its work again."""
Row = dict[str, Any]


def run_chaos(config: Config, minutes: float, *, is_quiet: bool = False) -> Row:
    """A run without faults, then one with them; gives what is printed as JSON. Raises ConfigError."""
    if not config.worker.pace_tokens_per_s:
        raise ConfigError("worker.pace_tokens_per_s is 0; set a pace that this machine keeps with half of its cores")
    calm, _ = _one_run(_named(config, "calm"), max(20.0, 60 * minutes * BASELINE_SHARE), [])
    faults = schedule(config.chaos.seed, 60 * minutes, config.chaos.every_s)
    stormy, wrong = _one_run(_named(config, "storm"), 60 * minutes, faults)
    result = _result(faults, calm, stormy, wrong)
    if not is_quiet:
        show(faults, result)
    return result


def _named(config: Config, suffix: str) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"name": f"{config.run.name}-{suffix}"})})


def _one_run(config: Config, seconds: float, faults: list[Fault]) -> tuple[Row, list[str]]:
    prepare(config, fresh=True)
    storm = Storm(config, seconds, faults)
    asyncio.run(storm.run())
    engine = open_engine(config.database_url)
    with engine.connect() as connection:
        restarts = [line for line in storm.metrics.lines() if line["kind"] == "restart"]
        for fault in faults:
            _settle(connection, fault, restarts)
        figures = _figures(connection, storm)
        wrong = violations(connection, storm.config)
    engine.dispose()
    return figures, wrong


# --- the swarm -------------------------------------------------------------------------------------------------------


class Quiet(Screen):
    """No last words: what came of it is the table."""

    async def conclude(self, summary: dict[str, Any], folder: Path) -> None:
        """Nothing."""


class Storm(Swarm):
    """A swarm in which every forked role reaches the coordinator through a link of its own, and faults happen."""

    def __init__(self, config: Config, seconds: float, faults: list[Fault]) -> None:
        super().__init__(config, is_plain=True)
        self.screen = Quiet(self.config, is_plain=True)
        self.seconds, self.faults = seconds, faults
        self.most_restarts = 1_000_000
        self.links: dict[str, Link] = {}
        self.alive: dict[str, list[list[float]]] = defaultdict(list)
        """Worker → [from, until] of its lives."""
        self.began = self.ended = 0.0
        self._watching: set[asyncio.Task[None]] = set()
        self._turn: dict[str, int] = defaultdict(int)

    def url_for(self, name: str) -> str:
        """Through a link."""
        return self.links[name].url if name in self.links else self.url

    async def _start(self) -> None:
        swarm = self.config.swarm
        names = [f"worker-{number + 1}" for number in range(swarm.workers)]
        names += ["trainer", *(f"validator-{number + 1}" for number in range(swarm.validators))]
        for name in names:
            self.links[name] = Link(self.config.coordinator.host, self.config.coordinator.port)
            await self.links[name].start()
        await super()._start()

    def _heard(self, event: dict[str, Any]) -> None:
        name = event.get("name", "")
        if name.startswith("worker-"):
            if event["event"] == "started":
                self.alive[name].append([time.time(), 0.0])
            elif self.alive[name]:
                self.alive[name][-1][1] = time.time()
        super()._heard(event)

    def _ended(self, name: str, code: int) -> None:
        """Whoever left well comes back too: a machine whose owner needed it for a moment."""
        super()._ended(name, code or -signal.SIGTERM)

    async def _watch(self) -> bool:
        await self._until(lambda status: status.latest.step >= 0 and status.accepted > 0)
        await asyncio.sleep(WARM_UP_S)
        self.began = time.time()
        until, due = self.began + self.seconds, list(self.faults)
        while not self.is_stopping and time.time() < until:
            await self._restart_processes()
            if due and time.time() - self.began >= due[0].due_s:
                self._note(asyncio.create_task(self._befall(due.pop(0))))
            await asyncio.sleep(0.1)
        self.ended = time.time()
        return True

    async def _until(self, is_so: Callable[[Status], bool]) -> None:
        while not self.is_stopping:
            await self._restart_processes()
            status = await self._status()
            if status is not None and is_so(status):
                return
            await asyncio.sleep(0.2)

    def _note(self, task: asyncio.Task[None]) -> None:
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)

    async def _end(self) -> None:
        for link in self.links.values():
            link.mend()
        await asyncio.gather(*self._watching, return_exceptions=True)
        await super()._end()
        for link in self.links.values():
            await link.close()

    # --- faults ------------------------------------------------------------------------------------------------------

    async def _befall(self, fault: Fault) -> None:
        """Do it, see when it shows and when work goes on."""
        fault.victim = self._victim(fault.role)
        pid = self._pid(fault.victim)
        if pid is not None and fault.role == "coordinator" and fault.kind in ("kill", "freeze"):
            pid = self._one_of(pid)
        if pid is None:
            fault.skipped = f"no {fault.role} was running"
            return
        fault.at, fault.lease = time.time(), await self._lease_of(fault.victim)
        if fault.role == "coordinator":
            self._note(asyncio.create_task(self._watch_coordinator(fault)))
        self.metrics.write("fault", fault.at, fault=fault.kind, name=fault.victim, lease=fault.lease)
        await getattr(self, "_" + fault.kind.replace("-", "_"))(fault, pid)

    def _victim(self, role: str) -> str:
        if role not in ("worker", "validator", "relay"):
            return role
        count = {"worker": self.config.swarm.workers, "validator": self.config.swarm.validators}
        self._turn[role] += 1
        return f"{role}-{1 + self._turn[role] % max(1, count.get(role, self.config.swarm.relays))}"

    def _pid(self, name: str) -> int | None:
        process = self.processes.get(name)
        if process is not None:
            return process.pid if process.returncode is None else None
        return self.forked.get(name)

    def _one_of(self, pid: int) -> int:
        """One of the processes of a coordinator that has several."""
        children = sorted(child.pid for child in psutil.Process(pid).children())
        self._turn["process"] += 1
        return children[self._turn["process"] % len(children)] if children else pid

    async def _kill(self, fault: Fault, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    async def _outage(self, fault: Fault, pid: int) -> None:
        """Kill all of it, whoever would replace a process included."""
        for process in [psutil.Process(pid), *psutil.Process(pid).children()]:
            process.kill()

    async def _drain(self, fault: Fault, pid: int) -> None:
        os.kill(pid, signal.SIGTERM)

    async def _freeze(self, fault: Fault, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(LASTS_S["freeze"])
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    async def _partition(self, fault: Fault, pid: int) -> None:
        self.links[fault.victim].cut()
        await asyncio.sleep(LASTS_S["partition"])
        self.links[fault.victim].mend()

    async def _slow(self, fault: Fault, pid: int) -> None:
        self.links[fault.victim].is_slow = True
        await asyncio.sleep(LASTS_S["slow"])
        self.links[fault.victim].mend()

    async def _full_disk(self, fault: Fault, pid: int) -> None:
        with full_disk([pid, *(child.pid for child in psutil.Process(pid).children())]):
            await asyncio.sleep(LASTS_S["full-disk"])

    async def _skew(self, fault: Fault, pid: int) -> None:
        """Its owner set the clock wrongly: it starts, is told so, leaves, and comes back once the clock is right."""
        self.orders[fault.victim]["skew_s"] = SKEW_S
        os.kill(pid, signal.SIGKILL)
        until = time.time() + WAITED_S
        while self._pid(fault.victim) in (None, pid) and time.time() < until:
            await asyncio.sleep(WATCH_S)
        self.orders[fault.victim]["skew_s"] = 0.0

    async def _corrupt(self, fault: Fault, pid: int) -> None:
        """Flip a bit of every file that a relay mirrors."""
        files = [path for path in (self.folder / "nodes" / fault.victim).rglob("*") if path.is_file()]
        for path in files:
            if len(path.name) == 64 and path.stat().st_size:
                with path.open("r+b") as file:
                    first = file.read(1)
                    file.seek(0)
                    file.write(bytes([first[0] ^ 1]))
        if not files:
            fault.skipped = f"{fault.victim} mirrors nothing yet"

    async def _lease_of(self, name: str) -> str:
        status = await self._status()
        return next((node.lease for node in status.nodes if node.name == name), "") if status else ""

    async def _watch_coordinator(self, fault: Fault) -> None:
        """Detected when a request fails or takes a second, recovered at the next that succeeds."""
        until = time.time() + WAITED_S
        async with httpx2.AsyncClient(trust_env=False, timeout=1.0) as client:
            while time.time() < until:
                since = time.time()
                try:
                    is_up = (await client.get(f"{self.url}/v1/runs/{self.config.run.name}/latest")).status_code == 200
                except httpx2.TransportError:
                    is_up = False
                if not is_up and fault.detected_s is None:
                    fault.detected_s = time.time() - fault.at
                if is_up and fault.detected_s is not None:
                    fault.recovered_s = time.time() - fault.at - fault.detected_s
                    return
                if is_up and since - fault.at > LASTS_S.get(fault.kind, 1.0) + 1:
                    fault.detected_s = fault.recovered_s = 0.0  # nobody noticed
                    return
                await asyncio.sleep(WATCH_S)

    # --- what comes back ---------------------------------------------------------------------------------------------

    async def _restart_processes(self) -> None:
        await super()._restart_processes()
        for number in range(self.config.swarm.relays):
            name = f"relay-{number + 1}"
            if name in self.processes and self.processes[name].returncode is not None and not self.is_stopping:
                self._ended(name, self.processes[name].returncode or 0)
                await self._spawn_relay(name)


# --- what the database says ------------------------------------------------------------------------------------------


def _settle(connection: Connection, fault: Fault, restarts: list[Row]) -> None:
    """When the fault showed and when its work was in other hands or done, from events with the coordinator's times.

    Of trainer, validator and scorer: when their end was seen, or, if they lived through it, when the fault was over.
    """
    if fault.skipped or fault.role == "coordinator":
        return
    if fault.role == "worker":
        _settle_lease(connection, fault)
    elif fault.role in ("trainer", "validator", "scorer"):
        noun, after = {
            "trainer": ("step", "committed"),
            "validator": ("audit", "done"),
            "scorer": ("rollout", "accepted"),
        }[fault.role]
        done = sa.and_(EVENTS.c.noun == noun, EVENTS.c.after == after, EVENTS.c.at > fault.at + WATCH_S)
        at = connection.execute(sa.select(sa.func.min(EVENTS.c.at)).where(done)).scalar()
        seen = [line["at"] for line in restarts if line["name"] == fault.victim and line["at"] >= fault.at]
        over = fault.at + LASTS_S.get(fault.kind, WAITED_S)
        fault.detected_s = min([*seen, over]) - fault.at
        fault.recovered_s = None if at is None else max(0.0, at - fault.at - fault.detected_s)
    else:
        fault.detected_s = fault.recovered_s = 0.0  # a relay is nobody's only source; the throughput has its cost


def _settle_lease(connection: Connection, fault: Fault) -> None:
    """A worker's fault shows when its lease ends unsubmitted, and is over when each of its samples is leased again."""
    ends = sa.select(EVENTS.c.at, EVENTS.c.after).where(EVENTS.c.subject == fault.lease, EVENTS.c.after != "open")
    end = connection.execute(ends).first()
    if end is None or end.after == "submitted":
        fault.detected_s = fault.recovered_s = 0.0  # it held nothing, or handed it in all the same
        return
    fault.detected_s = max(0.0, end.at - fault.at)
    lost = connection.execute(sa.select(ROLLOUTS).where(ROLLOUTS.c.lease == fault.lease)).all()
    again = [_leased_again(connection, row, end.at) for row in lost if row.status == "expired"]
    fault.recovered_s = max((at - end.at for at in again if at is not None), default=0.0)
    fault.lost_tokens = sum(_made_again(connection, row) for row in lost if row.status == "expired")


def _made_again(connection: Connection, row: Any) -> int:
    """Tokens that somebody else made of a sample: the same seed gives the same text, so no more of it was lost."""
    same = sa.and_(ROLLOUTS.c.group == row.group, ROLLOUTS.c.sample == row.sample, ROLLOUTS.c.rollout != row.rollout)
    return connection.execute(sa.select(sa.func.max(ROLLOUTS.c.tokens)).where(same)).scalar() or 0


def _leased_again(connection: Connection, row: Any, since: float) -> float | None:
    """When somebody else got the sample, or its group was dropped; None if neither came before the end."""
    same = sa.and_(ROLLOUTS.c.group == row.group, ROLLOUTS.c.sample == row.sample, ROLLOUTS.c.rollout != row.rollout)
    query = sa.select(sa.func.min(EVENTS.c.at)).join(ROLLOUTS, ROLLOUTS.c.rollout == EVENTS.c.subject)
    leased = connection.execute(query.where(same, EVENTS.c.after == "leased", EVENTS.c.at >= since)).scalar()
    if leased is not None:
        return leased
    dropped = sa.and_(EVENTS.c.subject == row.group, EVENTS.c.after == "dropped")
    return connection.execute(sa.select(sa.func.min(EVENTS.c.at)).where(dropped)).scalar()


def _figures(connection: Connection, storm: Storm) -> Row:
    """Accepted tokens against what the living workers should have made, and the rewards."""
    between = sa.and_(EVENTS.c.at >= storm.began, EVENTS.c.at < storm.ended)
    of = sa.and_(EVENTS.c.noun == "rollout", EVENTS.c.after == "accepted", between, GROUPS.c.purpose == "train")
    subjects = sa.select(ROLLOUTS.c.rollout, ROLLOUTS.c.tokens).join(EVENTS, EVENTS.c.subject == ROLLOUTS.c.rollout)
    rows = set(connection.execute(subjects.join(GROUPS, GROUPS.c.group == ROLLOUTS.c.group).where(of)).tuples())
    tokens = sum(row[1] for row in rows)
    alive = sum(_overlap(a, b or storm.ended, storm) for lives in storm.alive.values() for a, b in lives)
    rewards = list(
        connection.execute(sa.select(STEPS.c.seen_reward).where(STEPS.c.step > 0).order_by(STEPS.c.step)).scalars()
    )
    third = max(1, len(rewards) // 3)
    expired = sa.select(sa.func.count()).where(LEASES.c.status == "expired")
    return {
        "seconds": round(storm.ended - storm.began, 1),
        "accepted_tokens": tokens,
        "worker_seconds": round(alive, 1),
        "throughput": tokens / (storm.config.worker.pace_tokens_per_s * alive) if alive else 0.0,
        "steps": len(rewards),
        "reward_first": round(statistics.fmean(rewards[:third]), 3) if rewards else None,
        "reward_last": round(statistics.fmean(rewards[-third:]), 3) if rewards else None,
        "leases_expired": connection.execute(expired).scalar_one(),
    }


def _overlap(start: float, end: float, storm: Storm) -> float:
    return max(0.0, min(end, storm.ended) - max(start, storm.began))


def _median(values: list[float]) -> float | None:
    return round(statistics.median(values), 2) if values else None


def _result(faults: list[Fault], calm: Row, stormy: Row, wrong: list[str]) -> Row:
    done = [fault for fault in faults if not fault.skipped]
    noticed = [fault for fault in done if fault.detected_s or fault.recovered_s]
    of_trainer = [fault.recovered_s for fault in noticed if fault.role == "trainer" and fault.recovered_s is not None]
    return {
        "faults": len(done),
        "skipped": sorted({f"{fault.kind} {fault.role}: {fault.skipped}" for fault in faults if fault.skipped}),
        "by_role": {role: sum(f.role == role for f in done) for role in sorted({f.role for f in done})},
        "throughput_kept": round(stormy["throughput"] / calm["throughput"], 4) if calm["throughput"] else 0.0,
        "noticed": len(noticed),
        "detection_median_s": _median([f.detected_s for f in noticed if f.detected_s is not None]),
        "recovery_median_s": _median([f.recovered_s for f in noticed if f.recovered_s is not None]),
        "recovery_trainer_median_s": _median(of_trainer),
        "recovery_trainer_max_s": round(max(of_trainer), 2) if of_trainer else None,
        "lost_tokens": sum(fault.lost_tokens for fault in done),
        "never_recovered": [f"{f.kind} {f.victim}" for f in noticed if f.recovered_s is None],
        "invariant_violations": len(wrong),
        "violations": wrong[:20],
        "calm": calm,
        "storm": stormy,
    }


def show(faults: list[Fault], result: Row) -> None:
    """A table for people."""
    table = Table("at s", "fault", "victim", "detected s", "recovered s", "lost tokens", "lost lease", box=None)
    for fault in faults:
        seen = [f"{value:.2f}" if value is not None else "–" for value in (fault.detected_s, fault.recovered_s)]
        table.add_row(
            f"{fault.due_s:.0f}", fault.kind, fault.victim, *seen, str(fault.lost_tokens), fault.skipped or fault.lease
        )
    console = Console(highlight=False)
    console.print(table)
    for sentence in result["violations"]:
        console.print(f"broken: {sentence}")
    console.print(f"throughput kept {result['throughput_kept']:.3f} through {result['faults']} faults")
