"""A node's stay with a coordinator: find it, register, check whose word the run is, and keep saying "still here"."""

import asyncio
import contextlib
import logging
import platform
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass

import msgspec
import psutil

from farflung.net.client import Client
from farflung.net.metrics_server import expose
from farflung.net.node_stats import Held, NodeStats
from farflung.protocol.errors import BadSignature, ConfigError, FarflungError, TooOld
from farflung.protocol.identity import Key, Signed, node_id, seal, unseal
from farflung.protocol.messages import (
    VERSION,
    Delegation,
    Hardware,
    Heartbeat,
    HeartbeatReply,
    Latest,
    Lease,
    Register,
    Role,
    Run,
    RunInfo,
    Welcome,
)
from farflung.protocol.node_status import NodeStatus
from farflung.protocol.numerics import NOISE

log = logging.getLogger(__name__)
STOPPING_PATIENCE_S = 5.0
ERROR_CHARS = 300
PURPOSES = ("coordinator", "weights", "receipts", "verdicts")
"""Purposes for which the root delegates keys: the run's description and leases, and three kinds of documents."""
AWAY_S = 3600.0
"""Once a node is in, it waits this long for a coordinator that is away."""


class Index(msgspec.Struct, frozen=True):
    """Answer of GET /v1: this coordinator's identity."""

    coordinator: str
    version: int
    minimum_version: int
    root: bytes
    runs: list[str]


async def greet(client: Client) -> Index:
    """The coordinator at the client's address. Raises Refusal, or TooOld if it speaks another protocol than we do."""
    index = await client.get("/v1", Index)
    if not index.minimum_version <= VERSION <= index.version:
        raise TooOld(
            f"this node speaks protocol {VERSION}, {client.url} speaks {index.minimum_version} to {index.version}; "
            "upgrade with: pip install -U farflung"
        )
    return index


def hardware(
    accelerator: str = "",
    accelerator_bytes: int = 0,
    driver: str = "",
    precision: str = "",
    expected_tokens_per_s: float = 0.0,
    devices: int = 1,
) -> Hardware:
    """This machine, as it is shown to people, with the accelerator that is used if one is."""
    return Hardware(
        cpu=_shown(platform.processor() or platform.machine()),
        cores=psutil.cpu_count() or 0,
        memory_bytes=psutil.virtual_memory().total,
        accelerator=_shown(accelerator),
        accelerator_bytes=accelerator_bytes,
        devices=devices,
        driver=_shown(driver),
        precision=_shown(precision),
        expected_tokens_per_s=expected_tokens_per_s,
    )


def _shown(text: str) -> str:
    return "".join(c if c.isalnum() or c in " .:/+@()-_" else " " for c in text)[:80]


def cpu_s() -> float:
    """CPU-seconds of this process and its living children."""
    total = time.process_time()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = child.cpu_times()
            total += times.user + times.system
    return total


class Session:
    """One node in one run."""

    def __init__(
        self, client: Client, run: str, root: bytes, run_keys: "RunKeys", register: Register | None = None
    ) -> None:
        self.client, self.run, self.root, self.run_keys, self.stats = client, run, root, run_keys, NodeStats()
        self._register = register
        info = run_keys.info
        self.latest = Latest(status=info.status, step=-1, manifest="")
        self.lost: set[str] = set()
        """Leases that the coordinator has given to others."""
        self.held: dict[str, Held] = {}
        """The leases at work, by their ids."""
        self.node_status = NodeStatus()
        self.device = 0
        """Which of the node's devices this process works on."""

    @classmethod
    async def open(
        cls,
        client: Client,
        role: Role,
        *,
        run: str = "",
        root: bytes | None = None,
        name: str = "",
        engine: str = "",
        device: str = "",
        url: str = "",
        invite: str = "",
        profile: Callable[[RunInfo], str] = lambda info: "",
        machine: Hardware | None = None,
    ) -> "Session":
        """Learn the run, choose a numerics profile of it, register. Raises Refusal, BadSignature or ConfigError."""
        index = await greet(client)
        client.tag = index.coordinator
        run = run or _only(index.runs)
        answer = await client.get(f"/v1/runs/{run}", Run)
        run_keys = check_run(answer, run, root)
        info = run_keys.info
        if not index.coordinator == info.coordinator == node_id(answer.info.public):
            raise BadSignature(  # else it could pass on at another coordinator what this node signs for it
                f"{client.url} calls itself {index.coordinator}, but run {run!r} is kept by {info.coordinator}"
            )
        register = Register(
            version=VERSION,
            name=name,
            role=role,
            engine=engine,
            device=device,
            profile=profile(info),
            hardware=machine or hardware(),
            url=url,
            invite=invite,
        )
        await client.post("/v1/nodes", register, Welcome)
        client.patience_s = max(client.patience_s, AWAY_S)
        return cls(client, run, answer.root, run_keys, register)

    async def declare(self, profile: str) -> None:
        """Be judged by another numerics profile from now on. Raises Conflict while a lease is held, or Refusal."""
        assert self._register is not None
        self._register = msgspec.structs.replace(self._register, profile=profile)
        await self.client.post("/v1/nodes", self._register, Welcome)

    @property
    def info(self) -> RunInfo:
        """The coordinator's description of the run."""
        return self.run_keys.info

    async def keys(self, purpose: str, signed: Signed) -> list[bytes]:
        """The keys delegated for a purpose; the descriptor is read again where this document is by none of them."""
        if signed.public not in self.run_keys.keys(purpose, time.time()):
            answer = await self.client.get(f"/v1/runs/{self.run}", Run)
            self.run_keys = check_run(answer, self.run, self.root)
        return self.run_keys.keys(purpose, time.time())

    def path(self, rest: str) -> str:
        """A path of this run."""
        return f"/v1/runs/{self.run}/{rest}"

    @property
    def is_over(self) -> bool:
        """Whether the run has ended, or this node was ejected from it."""
        return self.latest.status == "finished" or self.node_status.is_ejected

    async def refresh(self) -> None:
        """Learn where the run stands, without a word of oneself; a coordinator that is away is waited for."""
        try:
            self.latest = await self.client.get(self.path("latest"), Latest)
        except FarflungError as error:
            log.warning("no answer because=%s", error)

    async def heartbeat(self) -> None:
        """One heartbeat, or one for each lease at work."""
        for held in list(self.held.values()) or [Held("", self.device)]:
            await self._heartbeat(held)

    async def _heartbeat(self, held: Held) -> None:
        stats = self.stats
        message = Heartbeat(
            phase=stats.phase,
            loaded_step=stats.loaded_step,
            cpu_s=cpu_s(),
            work_cpu_s=stats.work_cpu_s,
            recent_cpu_s=stats.recent_cpu_s,
            recent_tokens=stats.recent_tokens,
            made_cpu_s=stats.made_cpu_s,
            made_tokens=stats.made_tokens,
            proof_cpu_s=stats.proof_cpu_s,
            work_device_s=stats.work_device_s,
            recent_device_s=stats.recent_device_s,
            made_device_s=stats.made_device_s,
            proof_device_s=stats.proof_device_s,
            sync_pause_s=stats.sync_pause_s,
            started_at=stats.started_at,
            device=held.lane,
            lease=held.lease,
            made=held.made,
            fetched_bytes=stats.fetched_bytes,
            last_error=stats.last_error[:ERROR_CHARS],
        )
        reply = await self.client.post(self.path("heartbeat"), message, HeartbeatReply)
        self.latest = reply.latest
        self.lost.update(reply.lost_leases)
        if reply.lease_left_s:
            held.lapses_at = self.client.clock() + reply.lease_left_s
        self.node_status.hear(reply)

    @contextlib.contextmanager
    def holding(self, lease: Lease, lane: int = 0) -> Generator[Held]:
        """While this lease is worked on: heartbeats tell of progress, and their answers when it lapses."""
        held = self.held[lease.lease] = Held(lease.lease, lane, lease.expires_at)
        try:
            yield held
        finally:
            del self.held[lease.lease]

    async def keep_heartbeats(self, on_heartbeat: Callable[[], None] = lambda: None) -> None:
        """Heartbeats until cancelled; a coordinator that is away is waited for."""
        while True:
            try:
                await self.heartbeat()
                on_heartbeat()
            except FarflungError as error:
                log.warning("heartbeat failed because=%s", error)
            await asyncio.sleep(self.info.heartbeat_s)

    @contextlib.asynccontextmanager
    async def running(
        self,
        role: Role,
        stop: Callable[[], None],
        *,
        metrics_port: int = 0,
        on_heartbeat: Callable[[], None] = lambda: None,
    ) -> AsyncGenerator[None]:
        """A role's life: metrics, `stop` on signals and heartbeats; at its end a goodbye and a closed line."""
        expose(self, role, metrics_port)
        stop_on_signals(stop)
        heartbeats = asyncio.create_task(self.keep_heartbeats(on_heartbeat))
        try:
            yield
        finally:
            heartbeats.cancel()
            await self.say_goodbye()
            await self.client.close()

    def shorten_patience(self) -> None:
        """This role was told to stop: wait no longer than a moment for a coordinator that does not answer."""
        self.client.patience_s = min(self.client.patience_s, STOPPING_PATIENCE_S)

    async def say_goodbye(self) -> None:
        """A last heartbeat with the final figures; a coordinator that is gone is no reason to wait."""
        self.stats.phase = "gone"
        self.client.patience_s = 0.0
        with contextlib.suppress(FarflungError):
            await self.heartbeat()


def stop_on_signals(stop: Callable[[], None]) -> None:
    """Call `stop` on what ends a process in good order, where there is a main thread to be told."""
    if threading.current_thread() is threading.main_thread():
        loop = asyncio.get_running_loop()
        for number in ending_signals():
            loop.add_signal_handler(number, stop)


def ending_signals() -> list[signal.Signals]:
    """SIGTERM, SIGINT, and that the terminal was closed, unless that is ignored, as nohup has it."""
    found = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        found.append(signal.SIGHUP)
    return found


@dataclass(frozen=True)
class RunKeys:
    """A run's description by its coordinator and the delegations of its root, checked."""

    info: RunInfo
    delegations: tuple[Delegation, ...]

    def keys(self, purpose: str, now: float) -> list[bytes]:
        """Public keys that the root lets sign documents of one kind, those that are expired left out."""
        return [one.public for one in self.delegations if one.purpose == purpose and one.expires_at > now]


def check_run(answer: Run, run: str, root: bytes | None) -> RunKeys:
    """Follow root → delegations → info. Raises BadSignature, or ConfigError for a run with another noise."""
    if root is not None and answer.root != root:
        raise BadSignature(
            f"run {run!r} is vouched for by root {node_id(answer.root)}, not by {node_id(root)} of the address"
        )
    found = [unseal(signed, "delegation", Delegation, public=answer.root) for signed in answer.delegations]
    now = time.time()
    live = tuple(one for one in found if one.run == run and one.expires_at > now)
    if missing := set(PURPOSES) - {one.purpose for one in live}:
        raise BadSignature(
            f"the root of run {run!r} has delegated no key for {' and '.join(sorted(missing))}, or it has expired"
        )
    coordinators = [one.public for one in live if one.purpose == "coordinator"]
    info = unseal(answer.info, "run", RunInfo, public=coordinators)
    if info.run != run:
        raise BadSignature(f"asked for run {run!r}, got the info of {info.run!r}")
    if info.noise != NOISE:
        raise ConfigError(f"run {run!r} samples with the noise {info.noise!r}, this version of farflung has {NOISE!r}")
    return RunKeys(info, live)


def delegate(root: Key, run: str, purpose: str, public: bytes, expires_at: float) -> Signed:
    """The root key's word for another key."""
    return seal(root, "delegation", Delegation(run=run, purpose=purpose, public=public, expires_at=expires_at))  # type: ignore[arg-type]


def _only(runs: list[str]) -> str:
    if len(runs) != 1:
        raise ConfigError(f"this coordinator has the runs {', '.join(runs) or '(none)'}; name one with --run")
    return runs[0]
