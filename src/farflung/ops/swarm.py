"""`farflung run`: the whole swarm on one machine, each role a real process that speaks real HTTP over loopback.

Every role is forked from one of two nurseries, one with torch and one without, so that it starts in a moment.
What dies by accident is started again; what the configuration wants killed is killed.
"""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from farflung.config import Config, save
from farflung.coordinator.process import refuse_guessable
from farflung.ops.fitting import calibrated
from farflung.ops.nursery import LIGHT, REFUSED, die_with_parent
from farflung.ops.report import write_report
from farflung.ops.screen import Screen
from farflung.ops.summary import write_summary
from farflung.protocol.client import Client
from farflung.protocol.errors import ConfigError, FarflungError, Unreachable
from farflung.protocol.identity import Key
from farflung.protocol.messages import NodeView, Status
from farflung.protocol.server import listen
from farflung.rollouts.unscorable import refuse_unscorable
from farflung.store.book import holds_run
from farflung.store.db import shown
from farflung.store.metrics import Metrics
from farflung.tasks.found import founded_in, local_grants, refuse_another

log = logging.getLogger(__name__)
LOOK_S = 1.0
DOOMED_LOOK_S = 0.25
"""While a worker is still to be killed in the middle of a lease."""
SETTLE_S = 0.5
START_S = 240.0
STOP_S = 15.0
MOST_RESTARTS = 20
STEADY_S, PAUSES_S = 10.0, (0.05, 1.0)
"""What lived so long comes back after the first pause, what died sooner after the second."""
NURSERIES = ("torch", "light")


def prepare(config: Config, *, resume: bool = False, fresh: bool = False) -> None:
    """Make the run's folder, or find it for `--resume`. Raises ConfigError."""
    folder = config.folder
    refuse_guessable(config)
    if not config.model.path:
        raise ConfigError("model.path is missing; name a folder of a Hugging Face causal LM or its hub id")
    if resume and not (folder / "config.json").exists():
        raise ConfigError(f"{folder} holds no run to resume; start it without --resume")
    if resume:
        refuse_another(founded_in(folder), config)
    if folder.exists() and not resume:
        if not fresh:
            raise ConfigError(f"{folder} exists already; use --resume to go on, --fresh to throw it away")
        shutil.rmtree(folder)
    if not resume and config.coordinator.database and holds_run(config.database_url, config.run.name):
        raise ConfigError(
            f"database {shown(config.database_url)} holds run {config.run.name!r} already; name another run or "
            "database, or use --resume"
        )
    (folder / "keys").mkdir(parents=True, exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)


class Swarm:
    """Every process of an embedded run."""

    def __init__(self, config: Config, *, is_plain: bool) -> None:
        self.config = _settled(config)
        self.folder = self.config.folder
        self.path = self.folder / "config.json"
        self.url = f"{self.config.scheme}://{self.config.coordinator.host}:{self.config.coordinator.port}"
        self.client = Client(self.url, Key.make(), patience_s=0.0)
        self.metrics = Metrics(self.folder / "metrics.jsonl")
        self.screen = Screen(self.config, is_plain=is_plain)
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self.forked: dict[str, int] = {}
        self.orders: dict[str, dict[str, Any]] = {}
        self.restarts: dict[str, int] = {}
        self.killed: set[str] = set()
        self.is_stopping = False
        self.most_restarts = MOST_RESTARTS
        self._born: dict[str, float] = {}
        self._ready = {kind: asyncio.Event() for kind in NURSERIES}
        self._is_refused = False
        """Whether the trainer found that this model and these settings do not go together."""
        self._is_open, self._has_failed = False, asyncio.Event()
        """Whether the coordinator has answered once, and whether it ended before it did."""
        self._listening: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> int:
        """Start, watch, stop, sum up. Gives the exit code."""
        self.config = await calibrated(self.config, self.screen.note)
        self.metrics.begin(time.time())
        save(self.config, self.path)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop)
        is_finished = False
        with self.screen:
            try:
                await self._start()
                is_finished = await self._watch()
            finally:
                await self._end()
        self.metrics.write("end", time.time(), is_finished=is_finished)
        summary = write_summary(self.folder)
        await write_report(self.folder, summary)
        await self.screen.conclude(summary, self.folder)
        return 0 if is_finished else 130

    def stop(self) -> None:
        """Stop cleanly; `--resume` goes on later."""
        self.is_stopping = True

    # --- starting ----------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        await asyncio.gather(self._spawn_nursery("torch"), self._open())
        self._order("scorer", "scorer")
        for number in range(self.config.swarm.relays):
            self._order(f"relay-{number + 1}", "relay")
        self._order("trainer", "trainer")
        for number in range(self.config.swarm.validators):
            self._order(f"validator-{number + 1}", "validator")
        for name, attack in self._workers():
            self._order(name, "worker", attack)

    def _workers(self) -> list[tuple[str, str]]:
        swarm = self.config.swarm
        honest = [(f"worker-{number + 1}", "") for number in range(swarm.workers)]
        doomed = [(f"doomed-{number + 1}", "") for number in range(swarm.kill)]
        return [*doomed, *honest, *((cheat.name, cheat.attack) for cheat in swarm.cheats)]

    async def _open(self) -> None:
        """A coordinator that answers. Raises ConfigError."""
        await self._spawn_nursery("light")
        self._order("coordinator", "coordinator")
        if not await _first(self._until_it_answers(), self._has_failed.wait()):
            raise ConfigError(_last_words(self.folder / "logs" / "coordinator.log", self._has_failed.is_set()))
        self._is_open = True

    async def _until_it_answers(self) -> None:
        while not await self._answers():
            await asyncio.sleep(0.05)

    async def _answers(self) -> bool:
        try:
            await self.client.get(f"/v1/runs/{self.config.run.name}/status", Status)
        except FarflungError:
            return False
        return True

    async def _spawn_nursery(self, kind: str) -> None:
        name = f"nursery-{kind}"
        log_path = self.folder / "logs" / f"{name}.log"
        with log_path.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "farflung.ops.nursery", kind),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self.processes[kind] = process
        self._ready[kind].clear()
        self._listening[kind] = asyncio.create_task(self._listen(kind, process))
        if not await _first(self._ready[kind].wait(), process.wait()):
            raise ConfigError(_last_words(log_path, process.returncode is not None))

    def url_for(self, name: str) -> str:
        """Where a role finds the coordinator."""
        return self.url

    def _order(self, name: str, role: str, attack: str = "") -> None:
        """Have the nursery fork a role."""
        order = {"name": name, "role": role, "config": str(self.path), "url": self.url_for(name), "attack": attack}
        order = self.orders.get(name, {}) | order
        self.orders[name] = order
        stdin = self.processes[_nursery_of(role)].stdin
        assert stdin is not None, "nurseries are started with pipes"
        stdin.write(json.dumps(order).encode() + b"\n")

    async def _listen(self, kind: str, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None, "nurseries are started with pipes"
        while line := await process.stdout.readline():
            self._heard(kind, json.loads(line))

    def _heard(self, kind: str, event: dict[str, Any]) -> None:
        match event["event"]:
            case "ready":
                self._ready[kind].set()
            case "started":
                self.forked[event["name"]] = event["pid"]
                self._born[event["name"]] = time.monotonic()
            case "ended":
                self.forked.pop(event["name"], None)
                self._ended(event["name"], event["code"])

    def _ended(self, name: str, code: int) -> None:
        """What died by accident comes back; what ended well, was killed on purpose or was ejected does not."""
        if not self._is_open:
            self._has_failed.set()
        if self.is_stopping or not self._is_open or name in self.killed or (code == 0 and name != "coordinator"):
            return
        if code == REFUSED and name == "trainer":  # it would refuse the same again
            self._is_refused = True
            return
        self.restarts[name] = self.restarts.get(name, 0) + 1
        self.screen.note(f"{name} ended with {code}, starting it again")
        self.metrics.write("restart", time.time(), name=name, code=code)
        if self.restarts[name] > self.most_restarts:
            self.screen.note(f"{name} ended {self.most_restarts} times; see logs/{name}.log")
            self.is_stopping = True
            return
        pause_s = PAUSES_S[time.monotonic() - self._born[name] < STEADY_S]
        asyncio.get_running_loop().call_later(pause_s, self._order_again, name)

    def _order_again(self, name: str) -> None:
        if not self.is_stopping:
            order = self.orders[name]
            self._order(name, order["role"], order["attack"])

    # --- watching ----------------------------------------------------------------------------------------------------

    async def _watch(self) -> bool:
        """Until the run is finished (True) or somebody says stop (False). Raises ConfigError if the trainer does."""
        known: list[str] | None = None  # warnings of before a --resume
        while not self.is_stopping:
            if self._is_refused:
                raise ConfigError(_last_words(self.folder / "logs" / "trainer.log", has_ended=True))
            await self._restart_nurseries()
            status = await self._status()
            if status is not None:
                self.screen.show(status)
                known = status.warnings if known is None else known
                refuse_unscorable(status.warnings, known)
                await self._kill_doomed(status.nodes)
                if status.status == "finished":
                    return True
            is_killing = len(self.killed) < self.config.swarm.kill
            await asyncio.sleep(DOOMED_LOOK_S if is_killing else LOOK_S)
        return False

    async def _status(self) -> Status | None:
        try:
            return await self.client.get(f"/v1/runs/{self.config.run.name}/status", Status)
        except Unreachable:
            return None

    async def _restart_nurseries(self) -> None:
        """One that died took its children along."""
        for kind in NURSERIES:
            if self.processes[kind].returncode is not None and not self.is_stopping:
                self.screen.note(f"nursery-{kind} ended, starting it again")
                await self._spawn_nursery(kind)
                for name in [name for name in self.forked if _nursery_of(self.orders[name]["role"]) == kind]:
                    del self.forked[name]
                    self._ended(name, -signal.SIGTERM)

    async def _kill_doomed(self, nodes: list[NodeView]) -> None:
        """kill -9 a doomed worker in the middle of a lease: freeze it, look again, kill it if it still holds one."""
        for node in nodes:
            pid = self.forked.get(node.name)
            if pid is None or not node.name.startswith("doomed-") or node.name in self.killed or not node.lease:
                continue
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(SETTLE_S)  # a submission that is on its way would still end the lease
            status = await self._status()
            still = status is not None and any(n.name == node.name and n.lease for n in status.nodes)
            if still:
                self.killed.add(node.name)
                self.metrics.write("kill", time.time(), name=node.name, node=node.node)
                self.screen.note(f"killed {node.name} (-9) while it held lease {node.lease}")
                os.kill(pid, signal.SIGKILL)
            os.kill(pid, signal.SIGCONT)

    # --- stopping ----------------------------------------------------------------------------------------------------

    async def _end(self) -> None:
        """Stop every process: first those that hand in work, last the coordinator."""
        self.is_stopping = True
        await self._close("torch")
        await self._stop([name for name in self.forked if name != "coordinator"])
        await self._close("light")
        await self.client.close()

    async def _stop(self, names: list[str]) -> None:
        """Tell them to stop, and wait for it; whoever does not is killed with its nursery."""
        for name in names:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.forked[name], signal.SIGTERM)
        until = time.monotonic() + STOP_S
        while any(name in self.forked for name in names) and time.monotonic() < until:
            await asyncio.sleep(0.05)

    async def _close(self, kind: str) -> None:
        """Have a nursery stop its children and end."""
        process = self.processes.get(kind)
        if process is not None and process.returncode is None:
            assert process.stdin is not None, "nurseries are started with pipes"
            process.stdin.close()
            await _wait(process)
        if kind in self._listening:
            await self._listening[kind]  # its last words


def _nursery_of(role: str) -> str:
    return "light" if role in LIGHT else "torch"


async def _first(wanted: Coroutine[Any, Any, Any], unwanted: Coroutine[Any, Any, Any]) -> bool:
    """Whether something came about before something else did or START_S was up."""
    came, ended = asyncio.create_task(wanted), asyncio.create_task(unwanted)
    await asyncio.wait({came, ended}, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
    has_come = came.done()
    came.cancel()
    ended.cancel()
    return has_come


async def _wait(process: asyncio.subprocess.Process) -> None:
    try:
        async with asyncio.timeout(STOP_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _settled(config: Config) -> Config:
    """The configuration with this machine's own keys as trusted roles, and a port."""
    config = local_grants(config)
    coordinator = config.coordinator.model_copy(update={"port": _free_port(config)})
    return config.model_copy(update={"coordinator": coordinator})


def _free_port(config: Config) -> int:
    """The port that was asked for, or any free one. Raises ConfigError if it is taken."""
    with listen(config.coordinator.host, config.coordinator.port) as probe:
        return probe.getsockname()[1]


def _last_words(path: Path, has_ended: bool) -> str:
    """Why a process did not start: the last line of its log, without our own prefix, or that it takes too long."""
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    if not has_ended:
        return f"{path.stem} is not ready after {START_S:.0f} s; is this machine very busy? Its log is {path}"
    return (lines[-1] if lines else f"{path.stem} ended with nothing in {path}").removeprefix("farflung: ")
