"""`farflung run`: the whole swarm on one machine, each role a real process that speaks real HTTP over loopback.

Every role is forked from one of two forkservers, one with torch and one without, so that it starts in a moment.
A process that dies by accident is started again; one that the configuration wants killed is killed.
"""

import asyncio
import contextlib
import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from farflung.config import Config, save
from farflung.launch.desertion import Desertion, how_they_left
from farflung.launch.forkserver import LIGHT, die_with_parent
from farflung.launch.logs import LogWarnings, last_words
from farflung.launch.processes import comes_first, size_of, tell, wait_or_kill
from farflung.launch.profile_fit import calibrated
from farflung.launch.progress import Waits
from farflung.launch.report import write_report
from farflung.launch.restarts import REFUSED, STEADY_S, Restarts, killed_by
from farflung.launch.run_folder import prepare, why_disk_full
from farflung.launch.screen import Screen
from farflung.launch.summary import summarise, write_summary
from farflung.launch.terminal import let_go_of_lost
from farflung.net.client import Client
from farflung.net.hosts import url_of
from farflung.net.server import listen
from farflung.net.session import stop_on_signals
from farflung.protocol.errors import ConfigError, FarflungError, Unreachable
from farflung.protocol.identity import Key
from farflung.protocol.messages import NodeView, Status
from farflung.protocol.shown import one_line
from farflung.rollouts.unscorable import refuse_unscorable
from farflung.store import owner
from farflung.store.metrics import Metrics
from farflung.tasks.create_run import local_grants

__all__ = ["Swarm", "prepare"]
log = logging.getLogger(__name__)
LOOK_S = 1.0
DOOMED_LOOK_S = 0.25
"""While a worker is still to be killed in the middle of a lease."""
SETTLE_S = 0.5
START_S = 240.0
STOP_S = 15.0
PAUSES_S = (0.05, 1.0)
"""A process that lived for STEADY_S comes back after the first pause, one that died sooner after the second."""
DESERTED_S = 15.0
"""How long nothing may happen in a run whose workers are all gone."""
FORKSERVERS = ("torch", "light")


class Swarm:
    """Every process of an embedded run."""

    def __init__(self, config: Config, *, is_plain: bool, waits: Waits | None = None, concludes: bool = True) -> None:
        self.config = _settled(config)
        self.folder = self.config.folder
        self.path = self.folder / "config.json"
        self.url = url_of(self.config.scheme, self.config.coordinator.host, self.config.coordinator.port)
        self.client = Client(self.url, Key.make(), patience_s=0.0)
        self.metrics = Metrics(self.folder / "metrics.jsonl", time.monotonic)
        self._waits = waits or Waits()
        self.screen = Screen(self.config, is_plain=is_plain, since=self._waits.began_at, concludes=concludes)
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self.forked: dict[str, int] = {}
        self.commands: dict[str, dict[str, Any]] = {}
        self.restarts = Restarts()
        self.killed: set[str] = set()
        self.gone: dict[str, str] = {}
        """Workers and relays that do not come back, and why."""
        self.is_stopping = False
        self.failure = ""
        """Why the run cannot go on, if it cannot."""
        self._is_refused = False
        """Whether that is a setting that is wrong."""
        self._warnings = LogWarnings(self.folder / "logs")
        self._born: dict[str, float] = {}
        self._log_begins: dict[str, int] = {}
        """How long each role's log was when it was started."""
        self._desertion = Desertion()
        self._ready = {kind: asyncio.Event() for kind in FORKSERVERS}
        self._is_open, self._has_failed = False, asyncio.Event()
        """Whether the coordinator has answered once, and whether it ended before it did."""
        self._listening: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> int:
        """Start, watch, stop, sum up. Gives the exit code. Raises ConfigError."""
        self.config = await calibrated(self.config, self._waits)
        self.metrics.begin(time.time(), is_alone=True)
        save(self.config, self.path)
        stop_on_signals(self.stop)
        is_finished = False
        with self.screen:
            try:
                await self._start()
                is_finished = await self._watch()
            finally:
                await self._end()
        if self._is_refused:
            raise ConfigError(self.failure)
        self._record("end", is_finished=is_finished)
        await self._sum_up()
        if self.failure:
            sys.stderr.write(f"farflung: {one_line(self.failure)}\n")
        return 0 if is_finished else 1 if self.failure else 130

    def stop(self) -> None:
        """Stop cleanly; `--resume` goes on later."""
        self.is_stopping = True
        let_go_of_lost()

    def fail(self, why: str, *, is_refused: bool = False) -> None:
        """Stop because the run cannot go on; says why on the screen, and again as the last word."""
        if not self.failure:
            self.failure, self._is_refused = why, is_refused
            self.screen.note(why)
        self.is_stopping = True

    async def _sum_up(self) -> None:
        """Figures and report. A file that cannot be written, on a full disk say, does not keep back the rest."""
        with self._unless_it_fails("summary.json"):
            write_summary(self.folder)
        with self._unless_it_fails("report.html"):
            await write_report(self.folder, summarise(self.folder))
        with self._unless_it_fails("the figures"):
            await self.screen.conclude(summarise(self.folder), self.folder)

    @contextlib.contextmanager
    def _unless_it_fails(self, what: str) -> Generator[None]:
        try:
            yield
        except (OSError, FarflungError) as error:
            self.screen.say(f"{what} cannot be made: {error}")

    def _record(self, kind: str, **fields: Any) -> None:
        """A line of metrics.jsonl, if there is room for it."""
        try:
            self.metrics.write(kind, time.time(), **fields)
        except OSError as error:
            self.screen.warn("metrics.jsonl", f"cannot be written: {error.strerror}")

    # --- starting ----------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        self._waits("starting the coordinator, importing torch for the roles that compute")
        await asyncio.gather(self._spawn_forkserver("torch"), self._open())
        self._waits.over()
        self._fork_role("scorer", "scorer")
        for number in range(self.config.swarm.relays):
            self._fork_role(f"relay-{number + 1}", "relay")
        self._fork_role("trainer", "trainer")
        for number in range(self.config.swarm.validators):
            self._fork_role(f"validator-{number + 1}", "validator")
        for name, attack in self._workers():
            self._fork_role(name, "worker", attack)

    def _workers(self) -> list[tuple[str, str]]:
        swarm = self.config.swarm
        honest = [(f"worker-{number + 1}", "") for number in range(swarm.workers)]
        doomed = [(f"doomed-{number + 1}", "") for number in range(swarm.kill)]
        return [*doomed, *honest, *((cheat.name, cheat.attack) for cheat in swarm.cheats)]

    async def _open(self) -> None:
        """A coordinator that answers. Raises ConfigError."""
        await self._spawn_forkserver("light")
        self._fork_role("coordinator", "coordinator")
        if not await comes_first(self._until_it_answers(), self._has_failed.wait(), START_S):
            raise ConfigError(self._why_not_ready("coordinator", self._has_failed.is_set()))
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

    async def _spawn_forkserver(self, kind: str) -> None:
        name = f"forkserver-{kind}"
        log_path = self.folder / "logs" / f"{name}.log"
        self._log_begins[name] = size_of(log_path)
        with log_path.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "farflung.launch.forkserver", kind, self.config.model.path),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent,
                pass_fds=owner.held(self.folder),  # what outlives this process for a moment still owns the folder
            )
        self.processes[kind] = process
        self._ready[kind].clear()
        self._listening[kind] = asyncio.create_task(self._listen(kind, process))
        if not await comes_first(self._ready[kind].wait(), process.wait(), START_S):
            raise ConfigError(self._why_not_ready(name, process.returncode is not None))

    def url_for(self, name: str) -> str:
        """Where a role finds the coordinator."""
        return self.url

    def _fork_role(self, name: str, role: str, attack: str = "") -> None:
        """Have the forkserver fork a role."""
        command = {"name": name, "role": role, "config": str(self.path), "url": self.url_for(name), "attack": attack}
        command = self.commands.get(name, {}) | command
        self.commands[name] = command
        self._log_begins[name] = size_of(self._log_of(name))
        stdin = self.processes[_forkserver_of(role)].stdin
        assert stdin is not None, "forkservers are started with pipes"
        stdin.write(json.dumps(command).encode() + b"\n")

    async def _listen(self, kind: str, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None, "forkservers are started with pipes"
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
        """A role that died by accident comes back; one that ended well, was killed on purpose or ejected does not."""
        if not self._is_open:
            self._has_failed.set()
        if self.is_stopping or not self._is_open:
            return
        if name in self.killed or (code == 0 and name != "coordinator"):
            self.gone[name] = "was killed" if name in self.killed else "left"
            return
        words = self._words_of(name, code)
        lived_s = time.monotonic() - self._born.get(name, 0.0)
        if why := self.restarts.refuse(name, code, words, lived_s):
            self._give_up(name, why, is_refused=code == REFUSED)
            return
        self.screen.note(f"{name} ended with {code}, starting it again: {words}")
        self._record("restart", name=name, code=code)
        asyncio.get_running_loop().call_later(PAUSES_S[lived_s < STEADY_S], self._fork_again, name)

    def _give_up(self, name: str, why: str, *, is_refused: bool) -> None:
        """A run goes on without one of its workers or relays, but not without another role."""
        if self.commands[name]["role"] in ("worker", "relay"):
            self.gone[name] = why
            self.screen.note(f"{name} is not started again: {why}")
        else:
            text = "" if is_refused else f"; its log is {self._log_of(name)}"
            self.fail(f"{why}{text}", is_refused=is_refused)

    def _words_of(self, name: str, code: int) -> str:
        """Why a role ended, in its own words."""
        return killed_by(code) if code < 0 else last_words(self._log_of(name), self._log_begins.get(name, 0))

    def _why_not_ready(self, name: str, has_ended: bool) -> str:
        path = self._log_of(name)
        if not has_ended:
            return f"{name} is not ready after {START_S:.0f} s; is this machine very busy? Its log is {path}"
        return last_words(path, self._log_begins.get(name, 0)) or f"{name} ended with nothing in {path}"

    def _log_of(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def _fork_again(self, name: str) -> None:
        if not self.is_stopping:
            command = self.commands[name]
            self._fork_role(name, command["role"], command["attack"])

    # --- watching ----------------------------------------------------------------------------------------------------

    async def _watch(self) -> bool:
        """Until the run is finished (True), or it cannot go on or is told to stop (False)."""
        known: list[str] | None = None  # warnings of before a --resume
        while not self.is_stopping:
            await self._restart_forkservers()
            self._show_warnings()
            status = await self._status()
            if status is not None:
                self.screen.show(status)
                known = status.warnings if known is None else known
                refuse_unscorable(status.warnings, known)
                await self._kill_doomed(status.nodes)
                if status.status == "finished":
                    return True
                self._leave_if_deserted(status)
            is_killing = len(self.killed) < self.config.swarm.kill
            await asyncio.sleep(DOOMED_LOOK_S if is_killing else LOOK_S)
        return False

    def _show_warnings(self) -> None:
        """Show the warnings in the roles' logs, and those that none of them could write there."""
        for role, text in self._warnings.poll():
            self.screen.warn(role, text)
        if why := why_disk_full(self.folder):
            self.screen.warn("disk", why)

    def _leave_if_deserted(self, status: Status) -> None:
        """Fail once all workers are gone for good, none came from elsewhere, and nothing is under way any more."""
        own = {name for name, _ in self._workers()}
        still_s = self._desertion.still_s(own, self.gone, status, time.monotonic())
        if still_s is not None and still_s > max(DESERTED_S, 3 * self.config.lease.heartbeat_s):
            self.fail(f"no worker is left: {how_they_left(own, self.gone, status)}")

    async def _status(self) -> Status | None:
        try:
            return await self.client.get(f"/v1/runs/{self.config.run.name}/status", Status)
        except Unreachable:
            return None

    async def _restart_forkservers(self) -> None:
        """One that died took its children along."""
        for kind in FORKSERVERS:
            if self.processes[kind].returncode is not None and not self.is_stopping:
                self.screen.note(f"forkserver-{kind} ended, starting it again")
                await self._spawn_forkserver(kind)
                for name in [name for name in self.forked if _forkserver_of(self.commands[name]["role"]) == kind]:
                    del self.forked[name]
                    self._ended(name, -signal.SIGTERM)

    async def _kill_doomed(self, nodes: list[NodeView]) -> None:
        """kill -9 a doomed worker in the middle of a lease: freeze it, look again, kill it if it still holds one."""
        for node in nodes:
            pid = self.forked.get(node.name)
            if pid is None or not node.name.startswith("doomed-") or node.name in self.killed or not node.lease:
                continue
            tell(pid, signal.SIGSTOP)
            await asyncio.sleep(SETTLE_S)  # a submission that is on its way would still end the lease
            status = await self._status()
            still = status is not None and any(n.name == node.name and n.lease for n in status.nodes)
            if still:
                self.killed.add(node.name)
                self._record("kill", name=node.name, node=node.node)
                self.screen.note(f"killed {node.name} (-9) while it held lease {node.lease}")
            tell(pid, signal.SIGKILL if still else signal.SIGCONT)

    # --- stopping ----------------------------------------------------------------------------------------------------

    async def _end(self) -> None:
        """Stop every process: first those that hand in work, last the coordinator."""
        self.is_stopping = True
        await self._close("torch")
        await self._stop([name for name in self.forked if name != "coordinator"])
        await self._close("light")
        await self.client.close()

    async def _stop(self, names: list[str]) -> None:
        """Tell these processes to stop, and wait for it; one that does not is killed with its forkserver."""
        for name in names:
            tell(self.forked[name], signal.SIGTERM)
        until = time.monotonic() + STOP_S
        while any(name in self.forked for name in names) and time.monotonic() < until:
            await asyncio.sleep(0.05)

    async def _close(self, kind: str) -> None:
        """Have a forkserver stop its children and end."""
        process = self.processes.get(kind)
        if process is not None and process.returncode is None:
            assert process.stdin is not None, "forkservers are started with pipes"
            process.stdin.close()
            await wait_or_kill(process, STOP_S)
        if kind in self._listening:
            await self._listening[kind]  # its last words


def _forkserver_of(role: str) -> str:
    return "light" if role in LIGHT else "torch"


def _settled(config: Config) -> Config:
    """The configuration with this machine's own keys as trusted roles, and a port."""
    config = local_grants(config)
    coordinator = config.coordinator.model_copy(update={"port": _free_port(config)})
    return config.model_copy(update={"coordinator": coordinator})


def _free_port(config: Config) -> int:
    """The port that was asked for, or any free one. Raises ConfigError if it is taken."""
    with listen(config.coordinator.host, config.coordinator.port) as probe:
        return probe.getsockname()[1]
