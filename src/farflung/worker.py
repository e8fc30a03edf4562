"""Worker: lease → fetch weights → generate → submit. Untrusted, dials out only, may leave at any moment.

One with a server has two lanes, each at a lease of its own: once all requests of one are in the server, the other asks
for the next, so that the server's batch never drains.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from farflung.audits import self_test
from farflung.config import IdleSection, WorkerSection
from farflung.config.tree import WAVES
from farflung.engine.arithmetic import Own, choose
from farflung.engine.base import Completion, Engine
from farflung.engine.fit import node_slots
from farflung.engine.of_node import Place, held_in, make, own_numerics
from farflung.idle.loan import Loan
from farflung.net.client import Client
from farflung.net.node_stats import Held
from farflung.net.session import Session, hardware
from farflung.numerics.devices import accelerator, pick, say
from farflung.protocol.errors import (
    BadSignature,
    ConfigError,
    Ejected,
    EngineAway,
    FarflungError,
    LeaseGone,
    Malformed,
    NotFound,
    Rejected,
    TooLarge,
    WeightsError,
    WrongWeights,
)
from farflung.protocol.identity import Key, Signed
from farflung.protocol.messages import MAX_SAMPLES, Done, Empty, Lease, LeaseAnswer, LeaseRequest, RunInfo, Submission
from farflung.protocol.numerics import Numerics, Quantiser
from farflung.protocol.stops import Stops
from farflung.rollouts.lanes import AWAY_S, LOOK_S, Lanes
from farflung.rollouts.pace import Pace
from farflung.rollouts.receipts import Receipts
from farflung.rollouts.submit import generate, open_lease, submission_of, submit
from farflung.weights.cache import Versions
from farflung.weights.loaded import Loaded
from farflung.weights.patch import patch
from farflung.weights.tensors import fetch_model_config, fetch_stops

log = logging.getLogger(__name__)
WAIT_S = 5.0
SPARED, LONG_S = 0.05, 60.0
"""This share of a lease's first time is left at its end to hand in complete rollouts; of a short one none, for clocks
differ."""
Wrap = Callable[[Engine], Engine]


class Worker:
    """One worker. `wrap` may replace its engine, which is how adversaries are made for tests.

    `part` numbers the processes that work under one key and share a folder; None for a worker alone.
    """

    def __init__(
        self,
        url: str,
        key: Key,
        folder: Path,
        settings: WorkerSection,
        *,
        run: str = "",
        root: bytes | None = None,
        name: str = "",
        wrap: Wrap = lambda engine: engine,
        patience_s: float = 60.0,
        invite: str = "",
        expected_tokens_per_s: float = 0.0,
        part: int | None = None,
        idle: IdleSection | None = None,
    ) -> None:
        self.client = Client(url, key, patience_s=patience_s)
        self.key, self.folder, self.settings, self.name, self.wrap = key, folder, settings, name, wrap
        self._run, self._root, self._invite = run, root, invite
        self._expected, self._part = expected_tokens_per_s, part
        self._devices = 1 if part is None else max(1, settings.processes)
        self.loan = Loan(idle or IdleSection(), folder, settings)
        self.is_stopping = False
        self.slots = 0
        self.session: Session
        self.engine: Engine
        self.weights: Versions
        self.loaded: Loaded
        self._pace = Pace(settings.pace_tokens_per_s)
        self._idle_because, self._is_untried = "", True
        self._quantiser: Quantiser = ""

    async def run(self) -> None:
        """Work until the run ends, the node is ejected, or the worker is told to stop."""
        await self.open()
        port = self.settings.metrics_port
        async with self.session.running("worker", self.drain, metrics_port=port, on_heartbeat=self._prefetch):
            try:
                with self.loan.watching():
                    await self.loan.wait()
                    await self._prepare()
                    await self.lanes.work(self.step, self.drain, self._is_done)
            except Ejected as error:
                log.error("leaving because=%s", error)
            finally:
                await self.weights.close()
                await self._end_engine()

    async def open(self) -> None:
        """Join: register, check the run's descriptor, build the empty model."""
        self.device = pick("cpu" if self.settings.is_elsewhere else self.settings.device)
        if not self.settings.is_elsewhere:
            say("worker", self.device, self.settings.device)
        self.own = await self._own()
        self.session = await Session.open(
            self.client,
            "worker",
            run=self._run,
            root=self._root,
            name=self.name,
            engine=self.own.engine,
            device=self.own.device,
            invite=self._invite,
            profile=self._profile,
            machine=hardware(*accelerator(self.device), self._expected, self._devices),
        )
        self.session.device = self._part or 0
        self.profile = self._profile(self.session.info)
        numerics = self.session.info.profiles[self.profile]
        dtype, self._quantiser = held_in(numerics), numerics.quantiser
        self._count(numerics)
        log.info("judged by profile=%s for=%s", self.profile, numerics.text)
        config = await fetch_model_config(self.session)
        info, settings = self.session.info, self.settings
        self.slots = await asyncio.to_thread(node_slots, settings, info, self.device, config, dtype)
        log.info("room for slots=%d", self.slots)
        stops = await fetch_stops(self.session)
        place = Place(settings, info, self.device, self.folder / settings.engine / str(self._part or 0), self.slots)
        self._make = lambda: self._engine(place, config, dtype, stops)
        self.weights = Versions(
            self.session,
            self.folder / "weights",
            keep=self.settings.keep_versions,
            limit_bytes=int(self.settings.disk_gb * 1e9),
            upstream=self.settings.upstream,
            patch=patch,
            share=self._part,
        )
        await self._start_engine()
        self.lanes = self._new_lanes()
        self.loan.bind(self.session, self._end_engine, self._start_engine, self.drain, self._is_done)
        self._receipts = Receipts(self.folder, self._part)
        await self.session.heartbeat()

    def _engine(self, place: Place, config: bytes, dtype: torch.dtype, stops: Stops | None) -> Engine:
        return make(place, config, dtype, stops)

    def _new_lanes(self) -> Lanes:
        return Lanes(lambda: self._made, self.slots, self.session.device, self._devices, lambda: self.is_stopping)

    async def _start_engine(self) -> None:
        self.session.stats.phase = f"starting {self.settings.engine}"
        self._made = await asyncio.to_thread(self._make)
        self.engine = self.wrap(self._made)
        self.loaded = Loaded(self.engine, self.weights, stats=self.session.stats)

    async def _end_engine(self) -> None:
        """End it with all that it holds; nothing of it may be named anywhere after."""
        if self._made is not None:
            self.loaded.invalidate()
            await asyncio.to_thread(self._made.close)
            self._made = None
            del self.engine, self.loaded

    def _prefetch(self) -> None:
        if not self.loan.is_recalled:
            self.weights.prefetch()

    def _is_done(self) -> bool:
        return self.is_stopping or self.session.is_over

    async def _own(self) -> Own:
        return await own_numerics(self.settings)

    def _profile(self, info: RunInfo) -> str:
        """The run's profile that is this node's own. Raises ConfigError."""
        return choose(info, self.own, self.settings.profile)

    def _count(self, numerics: Numerics) -> None:
        """Have the seconds of what computes counted."""
        self.session.stats.accelerators = int(numerics.device != "cpu")
        self.session.stats.is_served = (numerics.engine, numerics.device) == ("vllm", "cpu")

    async def _prepare(self) -> None:
        """Load what the first lease will ask for, and try this machine's arithmetic on it. Raises ConfigError."""
        manifest = self.session.latest.manifest
        try:
            if not manifest or self._is_done():
                return
            await self.load(manifest)
        except ConfigError:
            raise
        except FarflungError as error:  # a lease will ask for it again
            log.warning("not loaded yet manifest=%s because=%s", manifest[:12], error)
            return
        if other := await self.try_numerics(manifest):
            await self._declare(other)

    async def _declare(self, profile: str) -> None:
        """Be judged by another profile, under which this machine's noise is forgiven; it computes as before."""
        await self.session.declare(profile)
        log.warning("judged by profile=%s instead of=%s because=its noise is forgiven there", profile, self.profile)
        self.profile = profile

    async def try_numerics(self, manifest: str) -> str:
        """With the first version that has a self-test: the profile to be judged by instead, if any.

        That is where the noise is not forgiven under the present one. Raises ConfigError where none admitted forgives.
        A server is tried with every version that has one, once it is loaded: it may say so, and keep part of what it
        had.
        """
        test = await self_test.fetch_or_none(self.session, manifest) if self._is_untried else None
        profile = self_test.profile_in(self.session, test, self.profile) if test else None
        if test is None or profile is None:
            return ""
        self._is_untried = False
        self._tell("self-test")
        about = self.session, self.engine, test, self.profile, profile
        return await self_test.elsewhere(*about, is_ignored=self.settings.ignore_self_test)

    def drain(self) -> None:
        """Stop soon: complete rollouts are handed in, the rest goes back."""
        log.info("draining phase=%s", self.session.stats.phase)
        self.is_stopping = True
        self.session.shorten_patience()

    async def step(self, lane: int | None = None) -> None:
        """One lease, from asking to handing in, once server and owner are ready for it."""
        lane = self.session.device if lane is None else lane
        if not await self.lanes.turn(lane):
            return
        try:
            await self.loan.wait()
            if self._is_done():
                return
            answer = await self._request(lane)
            if answer.lease is not None:
                await self._take(answer.lease, lane)
        finally:
            self.lanes.end_turn(lane)
        if answer.lease is None:
            self._say_why(answer.reason)
            await asyncio.sleep(answer.retry_after_s if not self.is_stopping else 0)

    def _tell(self, phase: str) -> None:
        """What this worker is at; while one lane generates, that."""
        self.session.stats.phase = "generating" if self.lanes.generating else phase

    async def _request(self, lane: int) -> LeaseAnswer:
        self._tell("waiting")
        slots = min(WAVES * self.slots, MAX_SAMPLES)
        fields = {"loaded_step": self.session.stats.loaded_step, "slots": slots, "device": lane}
        ask = LeaseRequest(**fields, context=self.settings.context, wait_s=WAIT_S)
        answer = await self.session.client.post(self.session.path("leases"), ask, LeaseAnswer)
        self.session.latest = answer.latest
        self._prefetch()
        return answer

    async def _take(self, signed: Signed, lane: int) -> None:
        self._idle_because = ""
        lease = await open_lease(self.session, signed)
        with self.session.holding(lease, lane):
            if lease.expires_at < self.client.clock():  # given again after a crash: it was extended since
                await self.session.heartbeat()
            await self._work(lease)

    def _say_why(self, reason: str) -> None:
        """That there is no work, once for each reason, so that no node idles without a word."""
        if reason.rstrip("0123456789 s") != self._idle_because:
            self._idle_because = reason.rstrip("0123456789 s")
            log.info("no lease because=%s status=%r", reason, str(self.session.node_status))

    async def _work(self, lease: Lease) -> None:
        if self.loan.is_recalled:
            await self._return(lease)
            return
        try:
            await self.load(lease.manifest, self.session.held[lease.lease])
            if other := await self.try_numerics(lease.manifest):
                await self._until_alone()
                await self._return(lease)
                await self._declare(other)
                return
            await self._hand_in(lease)
            self.lanes.away_s = AWAY_S
        except ConfigError:
            await self._return(lease)
            raise
        except EngineAway as error:
            log.error("returning lease=%s waiting_s=%.0f because=%s", lease.lease, self.lanes.away_s, error)
            self.loaded.invalidate()
            await self._return(lease)
            self._tell("waiting for its engine")
            await self.lanes.wait_for_engine(self.client.clock)
        except WrongWeights as error:
            log.error("loading the weights anew because=%s", error)
            self.loaded.invalidate()
        except (LeaseGone, Rejected) as error:
            log.warning("lost lease=%s because=%s", lease.lease, error)
        except (WeightsError, BadSignature, NotFound, Malformed, TooLarge) as error:
            log.error("refusing lease=%s because=%s", lease.lease, error)
            await self._return(lease)

    async def load(self, manifest_digest: str, held: Held | None = None) -> None:
        """Have these weights in the engine; the pause is only the swap when they were fetched before.

        What is generated with others comes to its end first, which counts as progress of the lease that waits.
        """
        figures = self.session.stats
        self._tell("fetching")
        await self.weights.fetch(manifest_digest)
        if held is not None:
            held.follow(lambda: self.engine.made)
        if not self.loaded.has(manifest_digest):
            await self._until_alone()
            before = time.monotonic()
            await asyncio.to_thread(self.loaded.ensure, manifest_digest, quantiser=self._quantiser)
            figures.sync_pause_s = time.monotonic() - before
            self._is_untried |= self.settings.engine == "vllm"

    async def _until_alone(self) -> None:
        """Until the other lane has handed its lease in."""
        while len(self.session.held) > 1:
            await asyncio.sleep(LOOK_S)

    async def _hand_in(self, lease: Lease) -> None:
        with self.session.stats.working("proof"):
            shown = self.loaded.possession(lease.nonce, lease.probe)
        before = time.monotonic()
        done = await self._generated(lease)
        await self._pace.keep(sum(len(completion.ids) for _, completion in done), lambda: self.is_stopping)
        if lease.lease in self.session.lost:
            raise LeaseGone(f"lease {lease.lease} was given to another")
        if not done:
            await self._return(lease)
            return
        assigned = sum(len(group.samples) for group in lease.groups)
        taken_s = time.monotonic() - before
        submission = submission_of(done, assigned=assigned, generate_s=taken_s, possession=shown)
        self._tell("submitting")
        await self.send(lease, submission)
        fields = lease.lease, lease.step, len(done), str(self.session.node_status)
        log.info("submitted lease=%s step=%d rollouts=%d status=%r", *fields)

    async def _generated(self, lease: Lease) -> list[tuple[str, Completion]]:
        self.lanes.generating += 1
        self._tell("generating")
        self.lanes.end_turn(self.session.held[lease.lease].lane)
        try:
            return await asyncio.to_thread(self._generate, lease)
        finally:
            self.lanes.generating -= 1

    async def send(self, lease: Lease, submission: Submission) -> None:
        """Hand a submission in, and keep the receipt."""
        receipt = await submit(self.session, lease, submission)
        self._receipts.keep(receipt, await self.session.keys("receipts", receipt))

    def _generate(self, lease: Lease) -> list[tuple[str, Completion]]:
        with self.session.stats.working():
            began, held = self.client.clock(), self.session.held[lease.lease]
            spared_s = SPARED * (held.lapses_at - began)
            with self.loan.generating():
                return generate(self.engine, lease, lambda: self._is_over(held, began, spared_s))

    def _is_over(self, held: Held, began: float, spared_s: float) -> bool:
        """Whether what is complete is to be handed in, the rest left to others."""
        until = held.lapses_at
        is_late = until - began > LONG_S and self.client.clock() > until - spared_s
        is_recalled = not self.loan.may_go_on()
        return self._is_done() or is_recalled or is_late or held.lease in self.session.lost

    async def _return(self, lease: Lease) -> None:
        await self.session.client.post(self.session.path(f"leases/{lease.lease}/return"), Empty(), Done)
