"""Routes for all: who this is, joining, weights, work, the run at a glance."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection, Row
from starlette.responses import Response

from farflung.audits import audit, canary
from farflung.coordinator.context import Office, digest_in
from farflung.net.server import BODY_BYTES, Call
from farflung.net.session import Index
from farflung.protocol import messages as m
from farflung.protocol.errors import Forbidden, Refusal, Unavailable
from farflung.protocol.identity import Signed
from farflung.queries import rulings, views
from farflung.rollouts import intake, orphan_gc, validate
from farflung.store.bulk import update_rows
from farflung.store.run import Book, ejected, node_rows, unknown_node
from farflung.store.tables import NODES
from farflung.tasks import admit, lease
from farflung.tasks.assign import Wait
from farflung.weights import origin

SMALL_BYTES = 64 << 10
"""A submission up to this size is inspected where it is read: handing it to a thread would take longer."""
SAMPLE_BYTES, TOKEN_BYTES = 256, 16
"""What a rollout and each of its tokens may take in a submission: id and log-probability, in base64."""

SEEN = NODES.update().where(NODES.c.node.in_(sa.bindparam("ids", expanding=True))).values(seen_at=sa.bindparam("at"))
MOST_LOST = 1000
"""Lost leases that one pulse tells of."""


async def index(office: Office, call: Call) -> Index:
    """Who this coordinator is and which runs it has."""
    return Index(
        office.book.key.id, m.VERSION, office.config.coordinator.minimum_version, office.papers.root, [office.book.run]
    )


async def register(office: Office, call: Call) -> m.Welcome:
    """Make a key known. The role it asks for must be one the operator granted it; a worker needs none."""
    ask: m.Register = call.message
    admit.check(office.config.coordinator, office.doors.roles.get(call.node, ""), call.node, ask, office.profiles.names)
    status = await office.write(lambda c: admit.admit(c, call.node, call.public, ask, office.clock()))
    return m.Welcome(node=call.node, role=ask.role, status=status, runs=[office.book.run])


async def run(office: Office, call: Call) -> m.Run:
    """The run's sealed papers: the root's delegations and what a node must know."""
    office.here(call)
    return office.papers


async def heartbeat(office: Office, call: Call) -> m.Pulse:
    """Keep a node's leases alive; tells it where the run stands, or now and then that its key is in use elsewhere."""
    office.here(call)
    pulse = await office.write_together(_note_beats, (call.node, call.message))
    office.twins.check(call.node, call.message, office.clock())
    return pulse


def _note_beats(
    office: Office, connection: Connection, beats: Sequence[tuple[str, m.Heartbeat]]
) -> list[m.Pulse | Refusal]:
    now, nodes = office.clock(), {node for node, _ in beats}
    rows = node_rows(connection, nodes)
    lost = lease.lost_leases(connection, nodes, now - 2 * office.config.lease.lease_s)
    latest, heard = office.book.latest(connection), [(rows[node], beat) for node, beat in beats if node in rows]
    for row, beat in heard:
        if row.receipt or row.role != "worker":  # a key that handed nothing in costs nobody anything
            office.metrics.note_node(row.node, row.role, row.registered_at, beat, now)
        if row.node in office.doors.roles:
            audit.renew(connection, office.book, row.node, now)
    last = {row.node: _beat_values(row.node, beat, now) for row, beat in heard}
    update_rows(connection, NODES, list(last.values()))
    judged = rulings.rulings(connection, office.book, rows.values())
    pulses = {
        node: _pulse(office.book, row, latest, lost.get(node, []), judged.get(node, [])) for node, row in rows.items()
    }
    return [pulses.get(node) or unknown_node(node) for node, _ in beats]


def _pulse(book: Book, row: Row[Any], latest: m.Latest, lost: list[str], judged: list[m.Ruling]) -> m.Pulse:
    clean, needed = rulings.progress(book, row)
    told = {"clean": clean, "needed": needed, "rulings": judged}
    return m.Pulse(latest=latest, status=row.status, lost_leases=lost[:MOST_LOST], **told)


async def latest(office: Office, call: Call) -> m.Latest:
    """The newest published step."""
    office.here(call)
    return await office.database.read_together(_latest, office)


def _latest(connection: Connection, offices: Sequence[Office]) -> list[m.Latest]:
    return [offices[0].book.latest(connection)] * len(offices)


async def weights(office: Office, call: Call) -> m.Weights:
    """Versions of the weights: bytes, and how many nodes have them."""
    office.here(call)
    return await office.weights.get()


async def relays(office: Office, call: Call) -> m.Relays:
    """Relays that are online; their bytes are checked, so none needs trust."""
    office.here(call)
    since = office.clock() - office.config.lease.lost_s
    return await office.database.read(lambda c: views.relays(c, since))


async def manifest(office: Office, call: Call) -> Signed:
    """A sealed manifest by its digest."""
    office.here(call)
    return await office.database.read(lambda c: views.manifest(c, office.book.run, call.path["digest"]))


async def self_test(office: Office, call: Call) -> m.SelfTest:
    """Rollouts that the trainer made with a version, for nodes to try their arithmetic on."""
    office.here(call)
    return await office.database.read(lambda c: canary.self_test(c, office.book, office.profiles, call.path["digest"]))


async def get_blob(office: Office, call: Call) -> Response:
    """The origin of shards and model files: bytes by digest, with Range."""
    response, size_bytes = await origin.serve(office.blobs, digest_in(call), call.request.headers.get("range", ""))
    office.metrics.count_sent(size_bytes)
    return response


async def ask_for_lease(office: Office, call: Call) -> m.LeaseAnswer:
    """Work for a node; waits up to wait_s for some. Asked again, the same lease."""
    office.here(call)
    ask: m.LeaseRequest = call.message
    issue = partial(office.write_together, _issue, (call.node, ask))
    return await office.hall.poll("lease", issue, lambda answer: answer.lease is not None, ask.wait_s)


def _issue(
    office: Office, connection: Connection, asks: Sequence[tuple[str, m.LeaseRequest]]
) -> list[m.LeaseAnswer | Refusal]:
    now, rows = office.clock(), node_rows(connection, {node for node, _ in asks})
    refused = {node: refusal for node, _ in asks if (refusal := _may_not_lease(office, rows.get(node), node))}
    let_in = [lease.Ask(rows[node], ask) for node, ask in asks if node not in refused]
    if let_in:
        connection.execute(SEEN, {"ids": [ask.node.node for ask in let_in], "at": now})
    found = iter(lease.issue(connection, office.book, let_in, now) if let_in else ())
    latest = office.book.latest(connection)
    return [refused[node] if node in refused else _lease_answer(office, latest, next(found)) for node, _ in asks]


def _may_not_lease(office: Office, row: Row[Any] | None, node: str) -> Refusal | None:
    if row is None:
        return unknown_node(node)
    if row.status == "ejected":
        return ejected(node)
    if row.role in ("worker", office.doors.roles.get(node)):
        return None
    return Forbidden(f"node {node} is registered as {row.role!r}; register as a worker to be leased work")


def _lease_answer(office: Office, latest: m.Latest, found: Signed | Wait | Refusal) -> m.LeaseAnswer | Refusal:
    if isinstance(found, Refusal):
        return found
    if isinstance(found, Signed):
        return m.LeaseAnswer(latest=latest, lease=found)
    return m.LeaseAnswer(latest=latest, reason=found.reason, retry_after_s=office.hall.pause_s("lease"))


async def submission_gate(office: Office, call: Call) -> int:
    """A submission may be as large as its lease can fill, in JSON, with log-probabilities, and no larger."""
    office.here(call)
    row, leased = await office.database.read_together(intake.leases_of, (call.path["lease"], call.node))
    call.request.state.lease = row, leased
    samples = sum(len(group.samples) for group in leased.groups)
    return BODY_BYTES + samples * (SAMPLE_BYTES + leased.budget * TOKEN_BYTES)


async def submission(office: Office, call: Call) -> Signed:
    """Take a lease's rollouts in; gives a sealed receipt, the same one if they are sent again."""
    row, leased = call.request.state.lease
    inspect = partial(validate.inspect, leased, call.node, call.message, *office.book.ending)
    sent = inspect() if len(call.body) <= SMALL_BYTES else await asyncio.to_thread(inspect)
    if (earlier := intake.receipt_of(row, sent, office.clock())) is not None:
        return earlier
    await office.archive.blobs.put(sent.body, sent.digest)
    logp = await office.archive.blobs.put(sent.logp) if sent.logp else None

    delivery = intake.Delivery(call.node, sent, call.message.possession, logp)
    try:
        receipt = await office.write_together(take, delivery)
    except Refusal as refusal:
        if not isinstance(refusal, Unavailable):  # then nobody knows what became of it
            await orphan_gc.discard(office.archive.blobs, office.database, [sent.digest, *([logp] if logp else [])])
        raise
    office.hall.wake()
    return receipt


def take(office: Office, connection: Connection, deliveries: Sequence[intake.Delivery]) -> list[Signed | Refusal]:
    """A receipt for each delivery, or why there is none."""
    return intake.take(connection, office.book, office.profiles, deliveries, office.clock())


async def give_back(office: Office, call: Call) -> m.Done:
    """A node that leaves hands its lease back."""
    office.here(call)
    changed = await office.write(lambda c: intake.give_back(c, call.path["lease"], call.node, office.clock()))
    return m.Done(changed=changed)


async def status(office: Office, call: Call) -> Response:
    """The run at a glance."""
    office.here(call)
    return (await office.glance.get()).answer(call)


async def prometheus(office: Office, call: Call) -> Response:
    """The same for Prometheus."""
    text = (await office.glance.get()).exposition
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def story(office: Office, call: Call) -> m.Story:
    """Everything that happened to one id."""
    return await office.database.read_page(lambda c: views.story(c, office.config, call.path["id"]))


def _beat_values(node: str, beat: m.Heartbeat, now: float) -> dict[str, Any]:
    said = {"phase": beat.phase, "loaded_step": beat.loaded_step, "beat": msgspec.msgpack.encode(beat)}
    return {"node": node, "seen_at": now} | said
