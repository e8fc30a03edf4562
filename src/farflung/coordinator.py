"""Coordinator: admits nodes, hands out leases, takes rollouts in, keeps records and ledger. An HTTP app, no torch.

Nothing in its memory matters: kill it at any moment, start it again, and nodes go on by themselves.
"""

import asyncio
import gc
import logging
import math
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa
import uvicorn
from fastapi import FastAPI
from sqlalchemy import Connection, Row
from starlette.responses import Response
from starlette.types import ASGIApp

from farflung.config import Config, save
from farflung.dashboard import heldout, pages, versions, views
from farflung.dashboard.prometheus import exposition
from farflung.protocol import messages as m
from farflung.protocol.admin import bears, read_token
from farflung.protocol.digest import digest_of
from farflung.protocol.errors import (
    ConfigError,
    Conflict,
    Forbidden,
    Malformed,
    NotFound,
    Refusal,
    WeightsError,
    WrongWeights,
)
from farflung.protocol.identity import Key, Signed, Trusted, unseal
from farflung.protocol.limits import Buckets, ByAddress
from farflung.protocol.server import BODY_BYTES, Call, Queue, Route, listen, mount
from farflung.protocol.session import Index
from farflung.rollouts import audit, brake, canary, compose, credit, intake, judge, orphans, possession, rollback
from farflung.rollouts.archive import Archive
from farflung.store.blobs import Blobs
from farflung.store.book import Book, node_rows, unknown_node
from farflung.store.db import Database, migrate
from farflung.store.metrics import Metrics
from farflung.store.rows import update_rows
from farflung.store.stories import last_event
from farflung.store.tables import NODES
from farflung.tasks import admit, keyring, lease
from farflung.tasks.assign import Wait
from farflung.tasks.found import Model, found, local_grants, seal_papers, weights_key
from farflung.trust.evidence import Profiles
from farflung.trust.profiles import load_profile
from farflung.weights import collect, origin
from farflung.weights.manifest import check_follows, manifest_digest, open_manifest

log = logging.getLogger(__name__)
T = TypeVar("T")
SWEEP_S = 0.25
DEAF_S = 1.0
"""A sweep so late says that this process was frozen or its database away, so that silence was no node's fault."""
IDLE_S = 1.0
"""Those who wait for work look again after so long without an event: claims lapse and audits linger by the clock."""
TIDY_S, ORPHAN_S = 900.0, 3600.0
BACKLOG = 2048
"""Connections that wait to be accepted."""
SWITCH_S = 0.0005
"""How long the database's writer may keep the interpreter from the one that answers; 5 ms, Python's own, is an age."""
GARBAGE = 20_000
"""New objects after which to look for cycles among them: a set of requests makes more than Python's own 700."""
BLOB_BYTES = 1 << 30
MANY_BYTES = 256 << 20
SMALL_BYTES = 64 << 10
"""A submission up to this size is inspected where it is read: handing it to a thread would take longer."""
SAMPLE_BYTES, TOKEN_BYTES = 256, 16
"""What a rollout and each of its tokens may take in a submission: id and log-probability, in base64."""

SEEN = NODES.update().where(NODES.c.node.in_(sa.bindparam("ids", expanding=True))).values(seen_at=sa.bindparam("at"))
MOST_LOST = 1000
"""Lost leases that one pulse tells of."""


class Coordinator:
    """One coordinator with one run, as `tasks/found.py` founds it. `papers` are what nodes check before they join."""

    def __init__(
        self,
        book: Book,
        papers: m.Run,
        weights_keys: Trusted,
        profiles: Profiles,
        archive: Archive,
        database: Database,
        blobs: Blobs,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
        admin_token: str = "",
    ) -> None:
        self.book, self.papers, self.weights_keys, self.profiles = book, papers, weights_keys, profiles
        self.archive, self.database, self.blobs, self.metrics, self.clock = archive, database, blobs, metrics, clock
        self._queues: defaultdict[str, Queue] = defaultdict(Queue)
        self._started_at = clock()
        self._swept_at, self._listening_since = math.inf, clock()
        """When the last sweep went through, and since when none was late and every commit went through."""
        self._failures = 0
        self._for_ever: list[asyncio.Task[None]] = []
        self._collected_step = 0
        self._woken_event, self._woken_at = 0, 0.0
        self._admin_token, limits = admin_token, self.config.coordinator
        self._by_key, self._by_address = (
            Buckets(per_s, per_s * limits.rate_burst_s, what=what)
            for per_s, what in ((limits.rate_per_key, "node"), (limits.rate_per_address, "address"))
        )
        self._noted = set[int]()
        """Policy steps whose evaluation has its line in metrics.jsonl."""
        self._roles = book.granted
        self.pages: pages.Pages | None = None
        """The dashboard, once there is an app."""

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.book.config

    # --- joining -----------------------------------------------------------------------------------------------------

    async def index(self, call: Call) -> Index:
        """Who this coordinator is and which runs it has."""
        return Index(
            self.book.key.id, m.VERSION, self.config.coordinator.minimum_version, self.papers.root, [self.book.run]
        )

    async def register(self, call: Call) -> m.Welcome:
        """Make a key known. The role it asks for must be one the operator granted it; a worker needs none."""
        ask: m.Register = call.message
        admit.check(self.config.coordinator, self._roles.get(call.node, ""), call.node, ask, self.profiles.names)
        status = await self._write(lambda c: admit.admit(c, call.node, call.public, ask, self.clock()))
        return m.Welcome(node=call.node, role=ask.role, status=status, runs=[self.book.run])

    async def run(self, call: Call) -> m.Run:
        """The run's sealed papers: the root's delegations and what a node must know."""
        self._here(call)
        return self.papers

    async def heartbeat(self, call: Call) -> m.Pulse:
        """Keep a node's leases alive; tells it where the run stands."""
        self._here(call)
        return await self.database.write_together(self._note_beats, (call.node, call.message))

    def _note_beats(self, connection: Connection, beats: Sequence[tuple[str, m.Heartbeat]]) -> list[m.Pulse | Refusal]:
        now, nodes = self.clock(), {node for node, _ in beats}
        rows = node_rows(connection, nodes)
        lost = lease.lost_leases(connection, nodes, now - 2 * self.config.lease.lease_s)
        latest, heard = self.book.latest(connection), [(rows[node], beat) for node, beat in beats if node in rows]
        for row, beat in heard:
            self.metrics.note_node(row.node, row.role, row.registered_at, beat, now)
            if row.node in self._roles:
                audit.renew(connection, self.book, row.node, now)
        last = {row.node: _beat_values(row.node, beat, now) for row, beat in heard}
        update_rows(connection, NODES, list(last.values()))
        return [
            m.Pulse(latest=latest, status=rows[node].status, lost_leases=lost.get(node, [])[:MOST_LOST])
            if node in rows
            else unknown_node(node)
            for node, _ in beats
        ]

    # --- weights -----------------------------------------------------------------------------------------------------

    async def latest(self, call: Call) -> m.Latest:
        """The newest published step."""
        self._here(call)
        return await self.database.read(self.book.latest)

    async def versions(self, call: Call) -> m.Weights:
        """Versions of the weights: bytes, and how many nodes have them."""
        self._here(call)
        return await self.database.read(lambda c: versions.versions(c, self.book, self.clock()))

    async def relays(self, call: Call) -> m.Relays:
        """Relays that are online; their bytes are checked, so none needs trust."""
        self._here(call)
        since = self.clock() - self.config.lease.lost_s
        return await self.database.read(lambda c: views.relays(c, since))

    async def manifest(self, call: Call) -> Signed:
        """A sealed manifest by its digest."""
        self._here(call)
        return await self.database.read(lambda c: views.manifest(c, self.book.run, call.path["digest"]))

    async def get_blob(self, call: Call) -> Response:
        """The origin of shards and model files: bytes by digest, with Range."""
        response, size_bytes = await origin.serve(self.blobs, _digest(call), call.request.headers.get("range", ""))
        self.metrics.count_sent(size_bytes)
        return response

    async def put_blob(self, call: Call) -> m.Done:
        """The trainer stores a shard under its digest."""
        self._here(call)
        await self._require(call, "trainer")
        digest = _digest(call)
        found = await asyncio.to_thread(digest_of, call.body)
        if found != digest:
            raise Malformed(f"the body hashes to {found[:12]}, not to {digest[:12]} of the path")
        await self.blobs.put(call.body, digest)
        return m.Done(changed=1)

    # --- work --------------------------------------------------------------------------------------------------------

    async def lease(self, call: Call) -> m.LeaseAnswer:
        """Work for a node; waits up to wait_s for some. Asked again, the same lease."""
        self._here(call)
        ask: m.LeaseRequest = call.message
        issue = partial(self.database.write_together, self._issue, (call.node, ask))
        return await self._poll("lease", issue, lambda answer: answer.lease is not None, ask.wait_s)

    def _issue(
        self, connection: Connection, asks: Sequence[tuple[str, m.LeaseRequest]]
    ) -> list[m.LeaseAnswer | Refusal]:
        now, rows = self.clock(), node_rows(connection, {node for node, _ in asks})
        refused = {node: refusal for node, _ in asks if (refusal := self._may_not_lease(rows.get(node), node))}
        let_in = [lease.Ask(rows[node], ask) for node, ask in asks if node not in refused]
        if let_in:
            connection.execute(SEEN, {"ids": [ask.node.node for ask in let_in], "at": now})
        found = iter(lease.issue(connection, self.book, let_in, now) if let_in else ())
        latest = self.book.latest(connection)
        return [refused[node] if node in refused else self._lease_answer(latest, next(found)) for node, _ in asks]

    def _may_not_lease(self, row: Row[Any] | None, node: str) -> Refusal | None:
        if row is None:
            return unknown_node(node)
        if row.role in ("worker", self._roles.get(node)):
            return None
        return Forbidden(f"node {node} is registered as {row.role!r}; register as a worker to be leased work")

    def _lease_answer(self, latest: m.Latest, found: Signed | Wait | Refusal) -> m.LeaseAnswer | Refusal:
        if isinstance(found, Refusal):
            return found
        if isinstance(found, Signed):
            return m.LeaseAnswer(latest=latest, lease=found)
        return m.LeaseAnswer(latest=latest, reason=found.reason, retry_after_s=self._queues["lease"].pause_s())

    async def submission(self, call: Call) -> Signed:
        """Take a lease's rollouts in; gives a sealed receipt, the same one if they are sent again."""
        row, leased = call.request.state.lease
        ids = self.book.vocab, self.book.eos_ids
        inspect = partial(intake.inspect, leased, call.node, call.message, *ids)
        parcel = inspect() if len(call.body) <= SMALL_BYTES else await asyncio.to_thread(inspect)
        if (earlier := intake.receipt_of(row, parcel, self.clock())) is not None:
            return earlier
        await self.archive.blobs.put(parcel.body, parcel.digest)
        logp = await self.archive.blobs.put(parcel.logp) if parcel.logp else None

        delivery = intake.Delivery(call.node, parcel, call.message.possession, logp)
        receipt = await self.database.write_together(self._take, delivery)
        self._wake()
        return receipt

    def _take(self, connection: Connection, deliveries: Sequence[intake.Delivery]) -> list[Signed | Refusal]:
        return intake.take(connection, self.book, self.profiles, deliveries, self.clock())

    async def give_back(self, call: Call) -> m.Done:
        """A node that leaves hands its lease back."""
        self._here(call)
        changed = await self._write(lambda c: intake.give_back(c, call.path["lease"], call.node, self.clock()))
        return m.Done(changed=changed)

    # --- scores and audits -------------------------------------------------------------------------------------------

    async def claim_scores(self, call: Call) -> m.ScoreJobs:
        """Transcripts for a scorer."""
        await self._require(call, "scorer")
        ask: m.Claim = call.message
        claim: Callable[[Connection], Any] = lambda c: (  # noqa: E731
            credit.claim_scores(c, self.book, call.node, ask.limit, self.clock()),
            self.book.latest(c),
        )
        rows, latest = await self._poll(
            "score", partial(self.database.write, claim), lambda answer: bool(answer[0]), ask.wait_s
        )
        return m.ScoreJobs(latest=latest, jobs=[await self._score_job(row) for row in rows])

    async def _score_job(self, row: Any) -> m.ScoreJob:
        ids = (await self.archive.body(row.submission)).rollouts[row.position].ids
        text = self.archive.text(ids)[: m.TRANSCRIPT_CHARS]
        return m.ScoreJob(rollout=row.rollout, task=row.payload, transcript=text)

    async def scores(self, call: Call) -> m.Done:
        """Rewards from a scorer."""
        await self._require(call, "scorer")
        results = call.message.results
        changed = await self._write(lambda c: credit.take_scores(c, self.book, call.node, results, self.clock()))
        return m.Done(changed=changed)

    async def claim_audits(self, call: Call) -> m.AuditJobs:
        """Drawn rollouts for a validator."""
        await self._require(call, "validator")
        ask: m.Claim = call.message

        def claim(connection: Connection) -> tuple[Any, list[m.AuditJob], m.Latest]:
            latest, now = self.book.latest(connection), self.clock()
            if canary.has_failed(connection, self.book, call.node, now - self.config.coordinator.claim_s):
                return (), [], latest
            rows = audit.claim_audits(connection, self.book, call.node, ask.limit, ask.linger_s, now)
            known = canary.jobs(connection, self.book, self.profiles.run, call.node, rows[0].step) if rows else []
            return rows, known, latest

        rows, known, latest = await self._poll(
            "audit", partial(self.database.write, claim), lambda answer: bool(answer[0]), ask.wait_s
        )
        return m.AuditJobs(latest=latest, jobs=[*known, *[await self._audit_job(row) for row in rows]])

    async def _audit_job(self, row: Any) -> m.AuditJob:
        body = await self.archive.body(row.submission)
        return await self.database.read(lambda c: audit.job(c, self.book, self.profiles, row, body))

    async def evidence(self, call: Call) -> m.Done:
        """Sealed findings of a validator; the verdict is the coordinator's."""
        await self._require(call, "validator")
        signed: Signed = call.message
        if signed.public != call.public:
            raise Forbidden("evidence must be sealed by the key that sends it")
        said = unseal(signed, judge.KIND, m.Evidence)
        if said.audit != call.path["audit"]:
            raise Malformed(f"this evidence is about audit {said.audit}, the path names {call.path['audit']}")
        # what follows from wrong weights is committed before they are refused
        if wrong := await self._write(lambda c: possession.of_evidence(c, self.book, call.node, said, self.clock())):
            raise WrongWeights(wrong)
        changed = await self._write(
            lambda c: judge.take_evidence(c, self.book, self.profiles, call.node, signed, self.clock())
        )
        return m.Done(changed=changed)

    # --- steps -------------------------------------------------------------------------------------------------------

    async def claim_step(self, call: Call) -> m.BatchAnswer:
        """The batch of a step for the trainer; asked again, the same one."""
        await self._require(call, "trainer")
        step = _number(call, "step")

        def claim(connection: Connection) -> m.BatchAnswer:
            found = compose.claim_step(connection, self.book, step, self.clock())
            latest = self.book.latest(connection)
            if isinstance(found, str):
                return m.BatchAnswer(latest=latest, reason=found)
            return m.BatchAnswer(latest=latest, batch=found)

        return await self._poll(
            "step", partial(self.database.write, claim), lambda answer: answer.batch is not None, call.message.wait_s
        )

    async def commit_step(self, call: Call) -> m.Done:
        """End a step: its weights are published, its rollouts trained."""
        await self._require(call, "trainer")
        commit: m.Commit = call.message
        digest = manifest_digest(commit.manifest)
        try:
            manifest = open_manifest(commit.manifest, self.weights_keys, self.book.run, digest)
        except WeightsError as error:
            raise Malformed(str(error)) from error
        if manifest.step != _number(call, "step"):
            raise Malformed(f"the manifest is of step {manifest.step}, the path of {call.path['step']}")
        await self._check_base(manifest)
        for shard in (*manifest.shards, *manifest.deltas):
            if await self.blobs.size(shard.digest) != shard.size_bytes:
                raise Malformed(f"shard {shard.digest[:12]} is stored with another size than the manifest's")
        figures = {name: value for name, value in commit.metrics.items() if math.isfinite(value)}  # JSON has no others
        changed = await self._write(
            lambda c: compose.commit_step(
                c, self.book, digest, manifest, msgspec.structs.replace(commit, metrics=figures), self.clock()
            )
        )
        if changed:
            self.metrics.note_step(manifest, figures, self.clock())
            await self._collect()
        return m.Done(changed=changed)

    async def _check_base(self, manifest: m.Manifest) -> None:
        """Refuse a difference to anything but the step before. Raises Conflict."""
        if manifest.deltas:
            signed = await self.database.read(lambda c: views.manifest(c, self.book.run, manifest.parent))
            try:
                check_follows(manifest, open_manifest(signed, self.weights_keys, self.book.run, manifest.parent))
            except WeightsError as error:
                raise Conflict(str(error)) from error

    async def _collect(self) -> None:
        """Delete the shards that no version in use needs."""
        spent, first = await self.database.read(lambda c: collect.spent(c, self.book, self._collected_step))
        await self.blobs.delete(spent)
        self._collected_step = first
        if spent:
            log.info("collected shards=%d before_step=%d", len(spent), first)

    async def trip(self, call: Call) -> m.Done:
        """The trainer's tripwire: submissions that leave the batch and are audited in full."""
        await self._require(call, "trainer")
        step, caught = _number(call, "step"), call.message.submissions
        return m.Done(changed=await self._write(lambda c: compose.trip(c, self.book, step, caught, self.clock())))

    async def release_brake(self, call: Call) -> m.Done:
        """The operator lets verdicts and training go on."""
        self._require_operator(call)

        def release(connection: Connection) -> int:
            changed = brake.release(connection, self.book, self.clock())
            judge.fold_all(connection, self.book, self.profiles, self.clock())
            return changed

        return m.Done(changed=await self._write(release))

    async def roll_back(self, call: Call) -> m.Done:
        """The operator takes up an earlier step again."""
        self._require_operator(call)
        ask: m.Rollback = call.message
        change: Callable[[Connection], int] = lambda c: rollback.roll_back(  # noqa: E731
            c, self.book, ask.to_step, ask.without, self.clock()
        )
        return m.Done(changed=await self._write(change))

    async def submission_body(self, call: Call) -> Response:
        """The tokens of a submission, for the trainer."""
        await self._require(call, "trainer")
        return Response(await self.archive.blobs.get(_digest(call)), media_type="application/octet-stream")

    async def logp_body(self, call: Call) -> Response:
        """The log-probabilities that a node sent along with a submission, for the trainer's mismatch metric."""
        await self._require(call, "trainer")
        blob = await self.database.read(lambda c: views.logp_blob(c, _digest(call)))
        try:
            found = await self.archive.blobs.get(blob) if blob else b""
        except NotFound:  # the same bytes, sent with a refused submission, were collected meanwhile: a metric less
            found = b""
        return Response(found, media_type="application/octet-stream")

    # --- looking -----------------------------------------------------------------------------------------------------

    async def status(self, call: Call) -> m.Status:
        """The run at a glance."""
        self._here(call)
        return await self.database.read(lambda c: views.status(c, self.book, self.clock()))

    async def prometheus(self, call: Call) -> Response:
        """The same for Prometheus."""
        return Response(exposition(await self.status(call)), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def story(self, call: Call) -> m.Story:
        """Everything that happened to one id."""
        return await self.database.read(lambda c: views.story(c, self.config, call.path["id"]))

    # --- before a large body is read ---

    def _gate(self, role: str, limit_bytes: int) -> Callable[[Call], Awaitable[int]]:
        async def gate(call: Call) -> int:
            await self._require(call, role)
            return limit_bytes

        return gate

    async def _submission_gate(self, call: Call) -> int:
        """A submission may be as large as its lease can fill, in JSON, with log-probabilities, and no larger."""
        self._here(call)
        row, leased = await self.database.read_together(intake.leases_of, (call.path["lease"], call.node))
        call.request.state.lease = row, leased
        samples = sum(len(group.samples) for group in leased.groups)
        return BODY_BYTES + samples * (SAMPLE_BYTES + leased.budget * TOKEN_BYTES)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _here(self, call: Call) -> None:
        if call.path.get("run", self.book.run) != self.book.run:
            raise NotFound(f"there is no run {call.path['run']!r} here; there is {self.book.run!r}")

    async def _require(self, call: Call, role: str) -> None:
        self._here(call)
        if self._roles.get(call.node) != role:
            raise Forbidden(f"this route is for the role {role!r}, which node {call.node} is not granted")

    def _require_operator(self, call: Call) -> None:
        """Who carries the token, or, in a run without one, signs with the coordinator's own key. Raises Forbidden."""
        self._here(call)
        if self._admin_token:
            if not bears(call.request.headers.get("authorization", ""), self._admin_token):
                log.warning("admin refused node=%s path=%s", call.node, call.request.scope["path"])
                raise Forbidden("this route is for the operator: send the admin token, Authorization: Bearer TOKEN")
            return
        if call.node != self.book.key.id:
            raise Forbidden("this route is for the operator: sign with the coordinator's own key")

    async def _write(self, change: Callable[[Connection], T]) -> T:
        """A transaction; whoever polls for work looks again after it."""
        result = await self.database.write(change)
        self._wake()
        return result

    def _wake(self) -> None:
        for queue in self._queues.values():
            queue.wake()

    async def _poll(
        self, kind: str, ask: Callable[[], Awaitable[T]], is_something: Callable[[T], bool], wait_s: float
    ) -> T:
        """Ask until there is something or the time is up, again when something changed and it is this one's turn."""
        until, queue = time.monotonic() + wait_s, self._queues[kind]
        while True:
            answer = await ask()
            if is_something(answer):
                queue.wake(1)
                return answer
            if not await queue.wait(until - time.monotonic()):
                return answer

    async def sweep(self) -> None:
        """For ever: take lapsed leases back, end the run when it is done, write metrics."""
        while True:
            try:
                await self._note_evals()
                self._wake_if_due(await self.database.write(self._sweep_once), time.monotonic())
                self._swept_at = self.clock()
                own = m.Heartbeat(cpu_s=time.process_time(), started_at=self._started_at)
                self.metrics.note_node(self.book.key.id, "coordinator", self._started_at, own, self.clock())
                self.metrics.flush(self.clock())
            except Exception:
                log.exception("sweep failed, going on")  # without a sweep no lease would ever lapse
            await asyncio.sleep(SWEEP_S)

    async def _note_evals(self) -> None:
        """Write down evaluations that are through, before the last of them ends the run."""
        latest = (await self.database.read(self.book.latest)).step
        if due := set(self.config.eval_steps(latest)) - self._noted:
            found = await self.database.read(lambda c: heldout.finished(c, self.config, due))
            if found:
                await asyncio.to_thread(self.metrics.note_evals, found, self.clock())
            self._noted |= {view.step for view in found}

    async def tidy(self) -> None:
        """For ever, now and then: delete bodies of submissions that were refused."""
        while True:
            await asyncio.sleep(TIDY_S * random.uniform(0.5, 1.5))
            try:
                await self.tidy_once(time.time())
            except Exception:
                log.exception("tidying failed, going on")

    async def tidy_once(self, now: float) -> int:
        """Once; `now` by the clock of the blob store."""
        count = await orphans.collect(self.archive.blobs, self.database, now - ORPHAN_S - self.config.lease.lease_s)
        if count:
            log.info("collected bodies=%d of refused submissions", count)
        return count

    def leave(self) -> None:
        """Keep nobody waiting, and take no more leases: whom nobody can reach any longer must call nobody silent."""
        for queue in self._queues.values():
            queue.close()
        for task in self._for_ever:
            task.cancel()
        if self.pages is not None:
            self.pages.live.stop()

    def _sweep_once(self, connection: Connection) -> int:
        """Gives the number of the last event."""
        now = self.clock()
        if now - self._swept_at > DEAF_S or self.database.failures != self._failures:
            self._listening_since, self._failures = now, self.database.failures
        lease.expire(connection, self.book, now, self._listening_since)
        compose.finish(connection, self.book, now)
        return last_event(connection)

    def _wake_if_due(self, event: int, now: float) -> None:
        """Whatever those who wait wait for is an event, this coordinator's or another's, or comes by time alone."""
        if event != self._woken_event or now - self._woken_at >= IDLE_S:
            self._woken_event, self._woken_at = event, now
            self._wake()

    def app(self) -> ASGIApp:
        """The HTTP application."""

        @asynccontextmanager
        async def life(_: FastAPI) -> AsyncIterator[None]:
            self._for_ever = [asyncio.create_task(self.sweep()), asyncio.create_task(self.tidy())]
            yield
            self.leave()
            self.metrics.flush(self.clock(), force=True)

        app = FastAPI(
            title="farflung coordinator", version=str(m.VERSION), lifespan=life, docs_url=None, redoc_url=None
        )
        served = mount(app, self.routes(), self.book.key.id, self.clock, self._count)
        self.pages = pages.mount(
            app, pages.Desk(self.config, self.database, self.archive, self.metrics.path, self.clock)
        )
        return ByAddress(served, self._by_address)

    def _count(self, node: str) -> None:
        """One request more of a node. Raises Busy, but for the operator's own roles, which have a whole run's work."""
        if node not in self._roles:
            self._by_key.take(node, time.monotonic())

    def routes(self) -> list[Route]:
        """The protocol, one line each."""
        run, admin, leased = "/v1/runs/{run}", "/v1/admin/runs/{run}", self._submission_gate
        scorer, validator = self._gate("scorer", MANY_BYTES), self._gate("validator", MANY_BYTES)
        trainer = self._gate("trainer", BLOB_BYTES)
        return [
            Route("GET", "/metrics", self.prometheus, signed=False),
            Route("GET", "/v1", self.index, None, Index, signed=False),
            Route("POST", "/v1/nodes", self.register, m.Register, m.Welcome),
            Route("GET", run, self.run, None, m.Run, signed=False),
            Route("GET", f"{run}/status", self.status, None, m.Status, signed=False),
            Route("GET", "/v1/story/{id}", self.story, None, m.Story, signed=False),
            Route("POST", f"{run}/heartbeat", self.heartbeat, m.Heartbeat, m.Pulse),
            Route("GET", f"{run}/latest", self.latest, None, m.Latest, signed=False),
            Route("GET", f"{run}/weights", self.versions, None, m.Weights, signed=False),
            Route("GET", f"{run}/relays", self.relays, None, m.Relays, signed=False),
            Route("GET", f"{run}/manifests/{{digest}}", self.manifest, None, Signed, signed=False),
            Route("GET", "/v1/blobs/{digest}", self.get_blob, signed=False),
            Route("PUT", f"{run}/blobs/{{digest}}", self.put_blob, None, m.Done, gate=trainer, raw=True),
            Route("POST", f"{run}/leases", self.lease, m.LeaseRequest, m.LeaseAnswer),
            Route("POST", f"{run}/leases/{{lease}}/submission", self.submission, m.Submission, Signed, gate=leased),
            Route("POST", f"{run}/leases/{{lease}}/return", self.give_back, m.Empty, m.Done),
            Route("POST", f"{run}/scores/claim", self.claim_scores, m.Claim, m.ScoreJobs),
            Route("POST", f"{run}/scores", self.scores, m.Scores, m.Done, gate=scorer),
            Route("POST", f"{run}/audits/claim", self.claim_audits, m.Claim, m.AuditJobs),
            Route("POST", f"{run}/audits/{{audit}}/evidence", self.evidence, Signed, m.Done, gate=validator),
            Route("POST", f"{run}/steps/{{step}}/claim", self.claim_step, m.ClaimStep, m.BatchAnswer),
            Route("POST", f"{run}/steps/{{step}}/trip", self.trip, m.Trips, m.Done, gate=trainer),
            Route("POST", f"{run}/steps/{{step}}/commit", self.commit_step, m.Commit, m.Done, gate=trainer),
            Route("GET", f"{run}/submissions/{{digest}}", self.submission_body),
            Route("GET", f"{run}/submissions/{{digest}}/logp", self.logp_body),
            Route("POST", f"{admin}/brake/release", self.release_brake, m.Empty, m.Done),
            Route("POST", f"{admin}/rollback", self.roll_back, m.Rollback, m.Done),
        ]


def _beat_values(node: str, beat: m.Heartbeat, now: float) -> dict[str, Any]:
    said = {"phase": beat.phase, "loaded_step": beat.loaded_step, "beat": msgspec.msgpack.encode(beat)}
    return {"node": node, "seen_at": now} | said


def _digest(call: Call) -> str:
    digest = call.path["digest"]
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise Malformed(f"{digest[:80]!r} is no digest in hex")
    return digest


def _number(call: Call, name: str) -> int:
    text = call.path[name]
    if not re.fullmatch(r"\d{1,9}", text):
        raise Malformed(f"{name} {text[:40]!r} is not a number")
    return int(text)


# --- the process -----------------------------------------------------------------------------------------------------


def load_profiles(config: Config) -> Profiles:
    """The numerics profiles that a run admits. Raises ConfigError."""
    run, *others = (load_profile(name) for name in (config.model.profile, *config.model.profiles))
    blind = [profile.name for profile in (run, *others) if not profile.fingerprint]
    if config.trust.fingerprint and blind:
        raise ConfigError(
            f"trust.fingerprint is set, but profile {blind[0]} bounds none; `farflung calibrate` makes one that does"
        )
    return Profiles(run, tuple(others))


async def open_coordinator(config: Config) -> Coordinator:
    """Everything a coordinator needs, from a configuration; the run is founded if it is new."""
    folder = config.folder
    (folder / "keys").mkdir(parents=True, exist_ok=True)
    signers = {name: Key.load_or_make(folder / "keys" / name) for name in ("coordinator", "receipts", "verdicts")}
    key = signers["coordinator"]
    publics = {name: one.public for name, one in signers.items()} | {"weights": weights_key(config)}
    ring = keyring.delegated(folder / "keys", config.run.name, publics, time.time())
    model, profiles = Model(config.model.path), load_profiles(config)
    await asyncio.to_thread(migrate, config.database_url)
    database, blobs = Database(config.database_url), Blobs(config.blobs_url)
    options = {"receipts": signers["receipts"], "verdicts": signers["verdicts"]}
    book = await found(config, database, model, key, time.time(), **options)
    papers = await seal_papers(config, blobs, model, key, ring, profiles.digests)
    archive, metrics = Archive(Blobs(config.submissions_url), model.tokenizer), Metrics(folder / "metrics.jsonl")
    weights = ring.live(config.run.name, "weights", time.time())
    token = read_token(config.coordinator.admin_token_file)
    return Coordinator(book, papers, weights, profiles, archive, database, blobs, metrics, admin_token=token)


def _server_options(config: Config, app: ASGIApp) -> uvicorn.Config:
    """How the server speaks. Raises ConfigError for a certificate that is none."""
    settings = config.coordinator
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise ConfigError("coordinator.tls_cert and coordinator.tls_key go together; one of them is missing")
    options = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=2,
        access_log=False,
        backlog=BACKLOG,
        proxy_headers=bool(settings.proxies),
        forwarded_allow_ips=list(settings.proxies),
        ssl_certfile=settings.tls_cert or None,
        ssl_keyfile=settings.tls_key or None,
    )
    try:
        options.load()
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"coordinator.tls_cert {settings.tls_cert} and tls_key {settings.tls_key} are no certificate with its key: "
            f"{error}"
        ) from error
    return options


async def serve(config: Config) -> None:
    """Run a coordinator until it is told to stop. One of several processes on a port begins and ends no stay."""
    is_one_of_many = config.coordinator.processes > 1
    listener = listen(config.coordinator.host, config.coordinator.port, is_shared=is_one_of_many)
    config = local_grants(config)
    coordinator = await open_coordinator(config)
    options = _server_options(config, coordinator.app())
    listener.listen(BACKLOG)  # who reads the line below may call at once: the call waits until it is taken
    host, port = listener.getsockname()[:2]
    url = f"{config.scheme}://{host}:{port}"
    log.info("listening url=%s run=%s", url, config.run.name)
    (config.folder / "coordinator.url").write_text(f"{url}\n")
    if not (config.folder / "config.json").exists():
        save(config, config.folder / "config.json")
    is_by_hand = not is_one_of_many and coordinator.metrics.begin(time.time())
    sys.setswitchinterval(SWITCH_S)
    gc.freeze()
    gc.set_threshold(GARBAGE)
    try:
        await pages.Server(options, coordinator.leave).serve(sockets=[listener])
    finally:
        coordinator.database.close()
        if is_by_hand:
            coordinator.metrics.write("end", time.time())
