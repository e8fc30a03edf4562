"""The swarm of `farflung chaos`: every role reaches the coordinator through a link of its own, and faults happen."""

import asyncio
import contextlib
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import psutil

from farflung.adversity.faults import LASTS_S, SKEW_S, Fault, Link, Postgres, await_writer, full_disk, hold
from farflung.config import Config
from farflung.launch.restarts import Restarts
from farflung.launch.swarm import Swarm
from farflung.net.client import Client
from farflung.net.session import Index
from farflung.protocol.errors import Busy, FarflungError, Unavailable, Unreachable
from farflung.protocol.identity import Key
from farflung.protocol.messages import Heartbeat, HeartbeatReply, Status

WARM_UP_S = 20.0
"""Until workers have made up for what they fell behind as they started; less in runs that are as short."""
WATCH_S = 0.05
WAITED_S = 60.0
LATE_S = 1.0
"""A request that takes so long has failed."""


class ChaosSwarm(Swarm):
    """A swarm to which faults happen; `server` is its PostgreSQL, if it has one of its own."""

    def __init__(self, config: Config, seconds: float, faults: list[Fault], server: Postgres | None = None) -> None:
        super().__init__(config, is_plain=True, concludes=False)
        self.seconds, self.faults, self.server = seconds, faults, server
        self.restarts = Restarts(most=1_000_000, most_alike=1_000_000)
        self.links: dict[str, Link] = {}
        self.alive: dict[str, list[list[float]]] = defaultdict(list)
        """Worker → [from, until] of its lives."""
        self.began = self.ended = 0.0
        self._tag = ""
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
        self._tag = (await self.client.get("/v1", Index)).coordinator

    def _heard(self, kind: str, event: dict[str, Any]) -> None:
        name = event.get("name", "")
        if name.startswith("worker-"):
            if event["event"] == "started":
                self.alive[name].append([time.time(), 0.0])
            elif self.alive[name]:
                self.alive[name][-1][1] = time.time()
        super()._heard(kind, event)

    def _ended(self, name: str, code: int) -> None:
        """A process that left well comes back too: a machine whose owner needed it for a moment."""
        super()._ended(name, code or -signal.SIGTERM)

    async def _watch(self) -> bool:
        await self._until(lambda status: status.latest.step >= 0 and status.accepted > 0)
        await asyncio.sleep(min(WARM_UP_S, self.seconds / 3))
        self.began = time.time()
        until, due = self.began + self.seconds, list(self.faults)
        while not self.is_stopping and time.time() < until:
            if due and time.time() - self.began >= due[0].due_s:
                self._note(asyncio.create_task(self._befall(due.pop(0))))
            await asyncio.sleep(0.1)
        self.ended = time.time()
        return True

    async def _until(self, is_so: Callable[[Status], bool]) -> None:
        while not self.is_stopping:
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

    # --- its victim --------------------------------------------------------------------------------------------------

    async def _befall(self, fault: Fault) -> None:
        """Do it, see when it shows and when work goes on."""
        fault.victim = self._victim(fault.role)
        pid = self.forked.get("coordinator" if fault.role == "database" else fault.victim)
        if pid is not None and fault.role == "coordinator" and fault.kind in ("kill", "freeze"):
            pid = self._one_of(pid)
        if pid is None:
            fault.skipped = f"no {fault.role} was running"
            return
        fault.lease = await self._lease_of(fault.victim)
        if fault.kind == "kill" and fault.role == "database":
            await asyncio.to_thread(await_writer, self.config.database_url)
        fault.at = time.time()
        if fault.role in ("coordinator", "database"):
            self._note(asyncio.create_task(self._watch_coordinator(fault)))
        self.metrics.write("fault", fault.at, fault=fault.kind, name=fault.victim, lease=fault.lease)
        await getattr(self, "_" + fault.kind.replace("-", "_"))(fault, pid)

    def _victim(self, role: str) -> str:
        if role not in ("worker", "validator", "relay"):
            return role
        count = {"worker": self.config.swarm.workers, "validator": self.config.swarm.validators}
        self._turn[role] += 1
        return f"{role}-{1 + self._turn[role] % max(1, count.get(role, self.config.swarm.relays))}"

    def _one_of(self, pid: int) -> int:
        """One of the processes of a coordinator that has several."""
        children = sorted(child.pid for child in psutil.Process(pid).children())
        self._turn["process"] += 1
        return children[self._turn["process"] % len(children)] if children else pid

    async def _lease_of(self, name: str) -> str:
        status = await self._status()
        return next((node.lease for node in status.nodes if node.name == name), "") if status else ""

    # --- what befalls it ---------------------------------------------------------------------------------------------

    async def _kill(self, fault: Fault, pid: int) -> None:
        if fault.role != "database":
            os.kill(pid, signal.SIGKILL)
        elif self.server is not None:
            await asyncio.to_thread(self.server.restart)
        else:
            await self._outage(fault, pid)  # an embedded database lives in the process that writes

    async def _outage(self, fault: Fault, pid: int) -> None:
        """Kill all of it, the parent that would replace a process included."""
        for process in [psutil.Process(pid), *psutil.Process(pid).children()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    async def _lock(self, fault: Fault, pid: int) -> None:
        await asyncio.to_thread(hold, self.config.database_url, LASTS_S["lock"])

    async def _restart(self, fault: Fault, pid: int) -> None:
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
        self.commands[fault.victim]["skew_s"] = SKEW_S
        os.kill(pid, signal.SIGKILL)
        until = time.time() + WAITED_S
        while self.forked.get(fault.victim) in (None, pid) and time.time() < until:
            await asyncio.sleep(WATCH_S)
        self.commands[fault.victim]["skew_s"] = 0.0

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

    # --- coordinator and database, as nodes see them -----------------------------------------------------------------

    async def _watch_coordinator(self, fault: Fault) -> None:
        """Detected when a request fails or takes too long, recovered at the next that succeeds.

        Where that is after the end of a fault that lasts, recovery counts from that end, as it does for all roles.
        """
        over_s = LASTS_S.get(fault.kind, 0.0)
        client = Client(self.url, Key.make(), self._tag, patience_s=0.0)
        while time.time() < fault.at + WAITED_S:
            since_s = time.time() - fault.at
            is_up = await self._writes(client)
            at_s = time.time() - fault.at
            if not is_up and fault.detected_s is None:
                fault.detected_s = at_s
            if is_up and fault.detected_s is not None:
                fault.recovered_s = at_s - (max(fault.detected_s, over_s) if at_s > over_s else fault.detected_s)
                break
            if is_up and since_s > over_s + LATE_S:
                fault.detected_s = fault.recovered_s = 0.0  # no process noticed
                break
            await asyncio.sleep(WATCH_S)
        await client.close()

    async def _writes(self, client: Client) -> bool:
        """Whether a request for which the coordinator has to ask its database for the turn to write is answered."""
        try:
            async with asyncio.timeout(LATE_S):
                await client.post(f"/v1/runs/{self.config.run.name}/heartbeat", Heartbeat(), HeartbeatReply)
        except (TimeoutError, Unreachable, Unavailable):
            return False
        except FarflungError as error:
            return not isinstance(error, Busy)  # it knows no such node, and looked
        return True
