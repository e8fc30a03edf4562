"""Routes for all: this coordinator's identity, joining, weights, work, the run at a glance."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection, Row
from starlette.responses import Response

from farflung.audits import audit, canary
from farflung.coordinator.context import Context, digest_in
from farflung.net.server import BODY_BYTES, Call
from farflung.net.session import Index
from farflung.protocol import messages as m
from farflung.protocol.errors import Forbidden, Refusal, Unavailable
from farflung.protocol.identity import Signed
from farflung.queries import rulings, views
from farflung.rollouts import blob_gc, intake, validate
from farflung.store.bulk import update_rows
from farflung.store.run import RunContext, ejected, node_rows, unknown_node
from farflung.store.tables import NODES
from farflung.tasks import admit, deadline, lease
from farflung.tasks.assign import Wait
from farflung.weights import origin

SMALL_BYTES = 64 << 10
"""A submission up to this size is inspected where it is read: handing it to a thread would take longer."""
SAMPLE_BYTES, TOKEN_BYTES = 256, 16
"""Bytes that a rollout and each of its tokens may take in a submission: id and log-probability, in base64."""

SEEN = NODES.update().where(NODES.c.node.in_(sa.bindparam("ids", expanding=True))).values(seen_at=sa.bindparam("at"))
MOST_LOST = 1000
"""Lost leases that one reply tells of."""


async def index(ctx: Context, call: Call) -> Index:
    """This coordinator's identity and the runs that it has."""
    return Index(
        ctx.run_ctx.key.id, m.VERSION, ctx.config.coordinator.minimum_version, ctx.descriptor.root, [ctx.run_ctx.run]
    )


async def register(ctx: Context, call: Call) -> m.Welcome:
    """Make a key known. The role it asks for must be one the operator granted it; a worker needs none."""
    ask: m.Register = call.message
    admit.check(ctx.config.coordinator, ctx.access.roles.get(call.node, ""), call.node, ask, ctx.profiles)
    status = await ctx.write(lambda c: admit.admit(c, call.node, call.public, ask, ctx.clock()))
    return m.Welcome(node=call.node, role=ask.role, status=status, runs=[ctx.run_ctx.run])


async def run(ctx: Context, call: Call) -> m.Run:
    """The run's sealed descriptor: the root's delegations and what a node must know."""
    ctx.here(call)
    return ctx.descriptor


async def heartbeat(ctx: Context, call: Call) -> m.HeartbeatReply:
    """Keep a node's lease, and extend it by progress; tells where the run stands, or that a key is in use elsewhere."""
    ctx.here(call)
    reply = await ctx.write_together(_note_heartbeats, (call.node, call.message))
    ctx.twins.check(call.node, call.message, ctx.clock())
    return reply


def _note_heartbeats(
    ctx: Context, connection: Connection, heartbeats: Sequence[tuple[str, m.Heartbeat]]
) -> list[m.HeartbeatReply | Refusal]:
    now, nodes = ctx.clock(), {node for node, _ in heartbeats}
    rows = node_rows(connection, nodes)
    lost = lease.lost_leases(connection, nodes, now - 2 * ctx.config.deadline_s)
    latest = ctx.run_ctx.latest(connection)
    heard = [(rows[node], heartbeat) for node, heartbeat in heartbeats if node in rows]
    for row, heartbeat in heard:
        if row.receipt or row.role != "worker":  # a key that handed nothing in costs the run nothing
            ctx.metrics.note_node(row.node, row.role, row.registered_at, heartbeat, now)
        if row.node in ctx.access.roles:
            audit.renew(connection, ctx.run_ctx, row.node, now)
    left_s = deadline.renew(connection, ctx.run_ctx, heard, now)
    last = {row.node: _heartbeat_values(row.node, heartbeat, now) for row, heartbeat in heard}
    update_rows(connection, NODES, list(last.values()))
    judged = rulings.rulings(connection, ctx.run_ctx, rows.values())

    def answer(node: str, lease: str) -> m.HeartbeatReply | Refusal:
        if (row := rows.get(node)) is None:
            return unknown_node(node)
        of_node = lost.get(node, []), judged.get(node, [])
        return _reply(ctx.run_ctx, row, latest, *of_node, left_s.get(lease, 0.0))

    return [answer(node, heartbeat.lease) for node, heartbeat in heartbeats]


def _reply(
    run_ctx: RunContext, row: Row[Any], latest: m.Latest, lost: list[str], judged: list[m.Ruling], left_s: float
) -> m.HeartbeatReply:
    clean, needed = rulings.progress(run_ctx, row)
    fields = {"clean": clean, "needed": needed, "rulings": judged, "lease_left_s": left_s}
    return m.HeartbeatReply(latest=latest, status=row.status, lost_leases=lost[:MOST_LOST], **fields)


async def latest(ctx: Context, call: Call) -> m.Latest:
    """The newest published step."""
    ctx.here(call)
    return await ctx.database.read_together(_latest, ctx)


def _latest(connection: Connection, contexts: Sequence[Context]) -> list[m.Latest]:
    return [contexts[0].run_ctx.latest(connection)] * len(contexts)


async def weights(ctx: Context, call: Call) -> m.Weights:
    """Versions of the weights: bytes, and how many nodes have them."""
    ctx.here(call)
    return await ctx.weights.get()


async def relays(ctx: Context, call: Call) -> m.Relays:
    """Relays that are online; their bytes are checked, so none needs trust."""
    ctx.here(call)
    since = ctx.clock() - ctx.config.lease.lost_s
    return await ctx.database.read(lambda c: views.relays(c, since))


async def manifest(ctx: Context, call: Call) -> Signed:
    """A sealed manifest by its digest."""
    ctx.here(call)
    return await ctx.database.read(lambda c: views.manifest(c, ctx.run_ctx.run, call.path["digest"]))


async def self_test(ctx: Context, call: Call) -> m.SelfTest:
    """Rollouts that the trainer made with a version, for nodes to try their arithmetic on."""
    ctx.here(call)
    return await ctx.database.read(lambda c: canary.self_test(c, ctx.run_ctx, ctx.profiles, call.path["digest"]))


async def get_blob(ctx: Context, call: Call) -> Response:
    """The origin of shards and model files: bytes by digest, with Range."""
    response, size_bytes = await origin.serve(ctx.blobs, digest_in(call), call.request.headers.get("range", ""))
    ctx.metrics.count_sent(size_bytes)
    return response


async def ask_for_lease(ctx: Context, call: Call) -> m.LeaseAnswer:
    """Work for a node; waits up to wait_s for some. Asked again, the same lease."""
    ctx.here(call)
    ask: m.LeaseRequest = call.message
    issue = partial(ctx.write_together, _issue, (call.node, ask))
    return await ctx.long_poll.poll("lease", issue, lambda answer: answer.lease is not None, ask.wait_s)


def _issue(
    ctx: Context, connection: Connection, asks: Sequence[tuple[str, m.LeaseRequest]]
) -> list[m.LeaseAnswer | Refusal]:
    now, rows = ctx.clock(), node_rows(connection, {node for node, _ in asks})
    refused = {node: refusal for node, _ in asks if (refusal := _may_not_lease(ctx, rows.get(node), node))}
    let_in = [lease.WorkRequest(rows[node], ask) for node, ask in asks if node not in refused]
    if let_in:
        connection.execute(SEEN, {"ids": [ask.node.node for ask in let_in], "at": now})
    found = iter(lease.issue(connection, ctx.run_ctx, let_in, now) if let_in else ())
    latest = ctx.run_ctx.latest(connection)
    return [refused[node] if node in refused else _lease_answer(ctx, latest, next(found)) for node, _ in asks]


def _may_not_lease(ctx: Context, row: Row[Any] | None, node: str) -> Refusal | None:
    if row is None:
        return unknown_node(node)
    if row.status == "ejected":
        return ejected(node)
    if row.role in ("worker", ctx.access.roles.get(node)):
        return None
    return Forbidden(f"node {node} is registered as {row.role!r}; register as a worker to be leased work")


def _lease_answer(ctx: Context, latest: m.Latest, found: Signed | Wait | Refusal) -> m.LeaseAnswer | Refusal:
    if isinstance(found, Refusal):
        return found
    if isinstance(found, Signed):
        return m.LeaseAnswer(latest=latest, lease=found)
    return m.LeaseAnswer(latest=latest, reason=found.reason, retry_after_s=ctx.long_poll.pause_s("lease"))


async def submission_gate(ctx: Context, call: Call) -> int:
    """A submission may be as large as its lease can fill, in JSON, with log-probabilities, and no larger."""
    ctx.here(call)
    row, leased = await ctx.database.read_together(intake.leases_of, (call.path["lease"], call.node))
    call.request.state.lease = row, leased
    samples = sum(len(group.samples) for group in leased.groups)
    return BODY_BYTES + samples * (SAMPLE_BYTES + leased.max_new_tokens * TOKEN_BYTES)


async def submission(ctx: Context, call: Call) -> Signed:
    """Take a lease's rollouts in; gives a sealed receipt, the same one if they are sent again."""
    row, leased = call.request.state.lease
    inspect = partial(validate.inspect, leased, call.node, call.message, *ctx.run_ctx.ending)
    sent = inspect() if len(call.body) <= SMALL_BYTES else await asyncio.to_thread(inspect)
    if (earlier := intake.receipt_of(row, sent, ctx.clock())) is not None:
        return earlier
    await ctx.archive.blobs.put(sent.body, sent.digest)
    logp = await ctx.archive.blobs.put(sent.logp) if sent.logp else None

    stored = intake.StoredSubmission(call.node, sent, call.message.possession, logp)
    try:
        receipt = await ctx.write_together(take, stored)
    except Refusal as refusal:
        if not isinstance(refusal, Unavailable):  # then the coordinator cannot tell whether it was stored
            await blob_gc.discard(ctx.archive.blobs, ctx.database, [sent.digest, *([logp] if logp else [])])
        raise
    ctx.long_poll.wake()
    return receipt


def take(ctx: Context, connection: Connection, deliveries: Sequence[intake.StoredSubmission]) -> list[Signed | Refusal]:
    """A receipt for each delivery, or why there is none."""
    return intake.take(connection, ctx.run_ctx, ctx.profiles, deliveries, ctx.clock())


async def give_back(ctx: Context, call: Call) -> m.Done:
    """A node that leaves hands its lease back."""
    ctx.here(call)
    changed = await ctx.write(lambda c: intake.give_back(c, call.path["lease"], call.node, ctx.clock()))
    return m.Done(changed=changed)


async def status(ctx: Context, call: Call) -> Response:
    """The run at a glance."""
    ctx.here(call)
    return (await ctx.glance.get()).answer(call)


async def prometheus(ctx: Context, call: Call) -> Response:
    """The same for Prometheus."""
    text = (await ctx.glance.get()).exposition
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def story(ctx: Context, call: Call) -> m.Story:
    """Everything that happened to one id."""
    return await ctx.database.read_page(lambda c: views.story(c, ctx.config, call.path["id"]))


def _heartbeat_values(node: str, heartbeat: m.Heartbeat, now: float) -> dict[str, Any]:
    said = {"phase": heartbeat.phase, "loaded_step": heartbeat.loaded_step}
    return {"node": node, "seen_at": now, "heartbeat": msgspec.msgpack.encode(heartbeat)} | said
