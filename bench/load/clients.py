"""Thousands of nodes without engines, for load and faults: real signed requests over raw sockets, made-up tokens.

What nodes do is paced by the clock, not by the answers, so a coordinator that falls behind shows in the latencies.
"""

import asyncio
import hashlib
import heapq
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec

from farflung.net.client import Client
from farflung.net.session import Index
from farflung.protocol import wire
from farflung.protocol.digest import digest_of
from farflung.protocol.errors import FarflungError, Unreachable
from farflung.protocol.identity import Key, Signed, seal, sign_request
from farflung.protocol.messages import (
    VERSION,
    BatchAnswer,
    ClaimStep,
    Commit,
    Done,
    Heartbeat,
    Lease,
    LeaseAnswer,
    LeaseRequest,
    Manifest,
    Receipt,
    Register,
    Shard,
    Submission,
    SubmittedRollout,
    Tensor,
    Welcome,
)
from farflung.weights.manifest import KIND, manifest_digest, target_digest

GIVE_UP_S = 60.0
KEPT_S = 3.0
HEAD = "{method} {path} HTTP/1.1\r\nhost: load\r\ncontent-type: application/msgpack\r\naccept: application/msgpack\r\n"


def simulated_key(seed: int, number: int) -> Key:
    """The key of one simulated node."""
    return Key(hashlib.sha256(f"simulated node {seed} {number}".encode()).digest())


def signed_bytes(key: Key, method: str, path: str, body: bytes, tag: str, now: float) -> bytes:
    """A whole signed HTTP/1.1 request."""
    headers = sign_request(key, method, path, "", body, now=now, tag=tag)
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{HEAD.format(method=method, path=path)}{lines}content-length: {len(body)}\r\n\r\n".encode() + body


Answer = tuple[int, bytes, bytes]
"""Status, head in lower case, and body."""


class Line:
    """One kept connection, one request at a time."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self._ear: _Ear | None = None
        self._used_at = 0.0

    async def ask(self, request: bytes) -> Answer:
        """Status, head and body of the answer. Raises OSError, EOFError or TimeoutError where there is none."""
        if time.monotonic() - self._used_at > KEPT_S:  # the server is about to hang up
            self.close()
        self._used_at = time.monotonic()
        loop = asyncio.get_running_loop()
        try:
            if self._ear is None:
                _, self._ear = await loop.create_connection(_Ear, self.host, self.port)
            answer = self._ear.answer = loop.create_future()
            giving_up = loop.call_later(GIVE_UP_S, _give_up, answer)
            self._ear.transport.write(request)
            try:
                found = await answer
            finally:
                giving_up.cancel()
        except BaseException:
            self.close()
            raise
        if b"connection: close" in found[1]:
            self.close()
        return found

    def close(self) -> None:
        """Hang up."""
        if self._ear is not None:
            self._ear.transport.close()
        self._ear = None


def _give_up(answer: asyncio.Future[Answer]) -> None:
    if not answer.done():
        answer.set_exception(TimeoutError(f"no answer for {GIVE_UP_S:.0f} s"))


class _Ear(asyncio.Protocol):
    """Hears whole answers; streams of asyncio would take longer for one than signing its request does."""

    transport: asyncio.WriteTransport
    answer: asyncio.Future[Answer] | None = None

    def __init__(self) -> None:
        self._heard = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The line is open."""
        self.transport = cast(asyncio.WriteTransport, transport)  # uvloop's is one, but does not say so

    def data_received(self, data: bytes) -> None:
        """Some bytes more."""
        self._heard += data
        end = self._heard.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        head = bytes(self._heard[:end]).lower()
        size = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        if len(self._heard) < end + size:
            return
        body = bytes(self._heard[end : end + size])
        del self._heard[: end + size]
        if self.answer is not None and not self.answer.done():
            self.answer.set_result((int(head[9:12]), head, body))

    def connection_lost(self, exc: Exception | None) -> None:
        """The other end has hung up."""
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(exc or EOFError("the line was closed before the answer came"))


@dataclass
class NodeStats:
    """What came of the requests: seconds from when each was due to its answer, and how often which status."""

    seconds: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    statuses: Counter[str] = field(default_factory=Counter[str])
    retried: int = 0

    def note(self, kind: str, status: int, took_s: float) -> None:
        """One answer."""
        self.statuses[f"{kind} {status}"] += 1
        self.seconds.setdefault(kind, []).append(took_s)


class LoadClients:
    """Nodes that beat, lease and submit over a few shared lines to any of `addresses`."""

    def __init__(
        self,
        addresses: Sequence[tuple[str, int]],
        run: str,
        tag: str,
        keys: Sequence[Key],
        *,
        lines: int,
    ) -> None:
        self.path, self.tag, self.keys, self.figures = f"/v1/runs/{run}", tag, keys, NodeStats()
        self.receipts: dict[str, Receipt] = {}
        """Lease → what was acknowledged for it."""
        self.random = random.Random(0)
        self.is_patient = False
        """Whether a request without an answer, or with 429 or 503, is sent again until it has one."""
        self._addresses = addresses
        self._lines: asyncio.LifoQueue[Line] = asyncio.LifoQueue()
        for number in range(lines):
            self._lines.put_nowait(Line(*addresses[number % len(addresses)]))
        self._free = list(range(len(keys)))
        self.random.shuffle(self._free)

    async def register(self, number: int) -> None:
        """Make a node known."""
        ask = Register(version=VERSION, name=f"simulated-{number}", role="worker")
        await self._send("register", number, "/v1/nodes", ask, Welcome, time.monotonic())

    async def beat(self, number: int, due: float) -> None:
        """One heartbeat."""
        await self._send("heartbeat", number, f"{self.path}/heartbeat", Heartbeat(started_at=1.0), None, due)

    async def lease(self, due: float) -> tuple[int, Lease] | None:
        """A lease for a node that has none; nothing if there was no work."""
        if not self._free:
            self.figures.statuses["lease without a free node"] += 1
            return None
        number = self._free.pop()
        answer = await self._send(
            "lease", number, f"{self.path}/leases", LeaseRequest(loaded_step=0, slots=64), LeaseAnswer, due
        )
        if answer is None or answer.lease is None:
            self._free.insert(0, number)
            return None
        return number, msgspec.msgpack.decode(answer.lease.payload, type=Lease)

    async def submit(self, number: int, lease: Lease, due: float) -> None:
        """Hand in tokens for a lease, the same ones for every rollout."""
        submission = Submission(
            rollouts=[
                SubmittedRollout(rollout=sample.rollout, ids=wire.pack_ids([*[5] * (lease.max_new_tokens - 1), 2]))
                for group in lease.groups
                for sample in group.samples
            ]
        )
        path = f"{self.path}/leases/{lease.lease}/submission"
        signed = await self._send("submission", number, path, submission, Signed, due)
        if signed is not None:
            self.receipts[lease.lease] = msgspec.msgpack.decode(signed.payload, type=Receipt)
        self._free.insert(0, number)

    async def _send(self, kind: str, number: int, path: str, message: Any, gives: Any, due: float) -> Any:
        """The answer of the first try that has one; nothing for one that was refused or, without patience, lost."""
        body, until, pause_s = wire.encode(message), time.monotonic() + GIVE_UP_S, 0.05
        while True:
            line = await self._lines.get()
            try:
                request = signed_bytes(self.keys[number], "POST", path, body, self.tag, time.time())
                status, _, found = await line.ask(request)
            except (OSError, EOFError, TimeoutError):
                status, found = 0, b""
                line.host, line.port = self.random.choice(self._addresses)
            finally:
                self._lines.put_nowait(line)
            self.figures.note(kind, status, time.monotonic() - due)
            if status not in (0, 429, 503) or not self.is_patient or time.monotonic() > until:
                break
            self.figures.retried += 1
            await asyncio.sleep(pause_s * self.random.uniform(0.5, 1.5))
            pause_s = min(2 * pause_s, 1.0)
        return wire.decode(found, gives) if status == 200 and gives is not None else None

    def close(self) -> None:
        """Hang up every line."""
        while not self._lines.empty():
            self._lines.get_nowait().close()


@dataclass(frozen=True)
class Pace:
    """How many of what in a second."""

    heartbeats: float
    leases: float
    hold_s: float = 2.0
    """From a lease to its submission."""


async def drive(
    clients: LoadClients, pace: Pace, seconds: float, each: Callable[[float], None] = lambda at: None
) -> None:
    """Send at a fixed pace, whatever the answers; ends when everything was answered. `each` is told the time."""
    start = time.monotonic()
    due: list[tuple[float, int, Callable[[float], Any]]] = []
    tasks: set[asyncio.Task[Any]] = set()
    count = 0

    def at(when: float, act: Callable[[float], Any]) -> None:
        nonlocal count
        count += 1
        heapq.heappush(due, (when, count, act))

    async def work(when: float) -> None:
        held = await clients.lease(when)
        if held is not None:
            at(time.monotonic() + pace.hold_s * clients.random.uniform(0.5, 1.5), lambda t: clients.submit(*held, t))

    for number in range(int(pace.heartbeats * seconds)):
        at(start + number / pace.heartbeats, lambda t, n=number: clients.beat(n % len(clients.keys), t))
    for number in range(int(pace.leases * seconds)):
        at(start + number / pace.leases, work)
    while due or tasks:
        now = time.monotonic()
        while due and due[0][0] <= now:
            when, _, act = heapq.heappop(due)
            task = asyncio.ensure_future(act(when))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        each(now - start)
        await asyncio.sleep(0.002)


# --- what else a run without engines needs ---------------------------------------------------------------------------


async def coordinator_id(url: str, patience_s: float = 60.0) -> str:
    """Who answers at `url`; waits until somebody does. Raises Unreachable."""
    client, until = Client(url, Key.make(), patience_s=0.0), time.monotonic() + patience_s
    try:
        while True:
            try:
                return (await client.get("/v1", Index)).coordinator
            except FarflungError as error:
                if time.monotonic() > until:
                    raise Unreachable(f"{url} did not answer for {patience_s:.0f} s") from error
            await asyncio.sleep(0.05)
    finally:
        await client.close()


async def publish_nothing(url: str, run: str, trainer: Key, *, step: int = 0, parent: str = "") -> str:
    """Be the trainer of one step whose weights are one number; gives the manifest's digest."""
    client = Client(url, trainer, await coordinator_id(url))
    path = f"/v1/runs/{run}"
    batch = (await client.post(f"{path}/steps/{step}/claim", ClaimStep(wait_s=10.0), BatchAnswer)).batch
    if batch is None:
        raise Unreachable(f"step {step} of run {run!r} is not ready to be claimed")
    data = f"weights of step {step}".encode()
    digest = digest_of(data)
    await client.put(f"{path}/blobs/{digest}", data)
    tensors = [Tensor(name="w", dtype="float32", shape=[1], digest=digest, shard=0)]
    manifest = Manifest(
        run=run,
        step=step,
        base_step=step,
        parent=parent,
        digest=target_digest(tensors),
        tensors=tensors,
        shards=[Shard(digest=digest, size_bytes=len(data))],
        secret_commitment=batch.secret_commitment,
        made_at=time.time(),
        expires_at=time.time() + 1e6,
    )
    signed = seal(trainer, KIND, manifest)
    await client.post(f"{path}/steps/{step}/commit", Commit(manifest=signed, metrics={}, checkpoint=""), Done)
    await client.close()
    return manifest_digest(signed)
