"""Routes for the trainer: a step from its batch to its commit."""

import asyncio
import logging
import math
from functools import partial

import msgspec
from sqlalchemy import Connection
from starlette.responses import Response

from farflung.audits import steering
from farflung.coordinator.context import Office, digest_in, number_in
from farflung.net.server import Call
from farflung.protocol import messages as m
from farflung.protocol.digest import digest_of
from farflung.protocol.errors import Conflict, Malformed, NotFound, WeightsError
from farflung.queries import views
from farflung.rollouts import compose
from farflung.weights import shard_gc
from farflung.weights.manifest import check_follows, manifest_digest, open_manifest

log = logging.getLogger(__name__)


async def claim_step(office: Office, call: Call) -> m.BatchAnswer:
    """The batch of a step for the trainer; asked again, the same one."""
    office.require(call, "trainer")
    step = number_in(call, "step")

    def claim(connection: Connection) -> m.BatchAnswer:
        found = compose.claim_step(connection, office.book, step, office.clock())
        latest = office.book.latest(connection)
        if isinstance(found, str):
            return m.BatchAnswer(latest=latest, reason=found)
        return m.BatchAnswer(latest=latest, batch=found)

    return await office.hall.poll(
        "step", partial(office.database.write, claim), lambda answer: answer.batch is not None, call.message.wait_s
    )


async def submission_body(office: Office, call: Call) -> Response:
    """The tokens of a submission, for the trainer."""
    office.require(call, "trainer")
    return Response(await office.archive.blobs.get(digest_in(call)), media_type="application/octet-stream")


async def logp_body(office: Office, call: Call) -> Response:
    """The log-probabilities that a node sent along with a submission, for the trainer's mismatch metric."""
    office.require(call, "trainer")
    blob = await office.database.read(lambda c: views.logp_blob(c, digest_in(call)))
    try:
        found = await office.archive.blobs.get(blob) if blob else b""
    except NotFound:  # the same bytes, sent with a refused submission, were collected meanwhile: a metric less
        found = b""
    return Response(found, media_type="application/octet-stream")


async def trip(office: Office, call: Call) -> m.Done:
    """The trainer's tripwire: submissions that leave the batch and are audited in full, and what all replays found."""
    office.require(call, "trainer")
    step, caught, looked = number_in(call, "step"), call.message.submissions, call.message.looked

    def take(connection: Connection) -> int:
        tripped = compose.trip(connection, office.book, step, caught, office.clock())
        return tripped + steering.take_looks(connection, office.book, office.profiles, step, looked, office.clock())

    return m.Done(changed=await office.write(take))


async def put_blob(office: Office, call: Call) -> m.Done:
    """The trainer stores a shard under its digest."""
    office.require(call, "trainer")
    digest = digest_in(call)
    found = await asyncio.to_thread(digest_of, call.body)
    if found != digest:
        raise Malformed(f"the body hashes to {found[:12]}, not to {digest[:12]} of the path")
    await office.blobs.put(call.body, digest)
    return m.Done(changed=1)


async def commit_step(office: Office, call: Call) -> m.Done:
    """End a step: its weights are published, its rollouts trained."""
    office.require(call, "trainer")
    commit: m.Commit = call.message
    digest = manifest_digest(commit.manifest)
    try:
        manifest = open_manifest(commit.manifest, office.weights_keys, office.book.run, digest)
    except WeightsError as error:
        raise Malformed(str(error)) from error
    if manifest.step != number_in(call, "step"):
        raise Malformed(f"the manifest is of step {manifest.step}, the path of {call.path['step']}")
    await _check_base(office, manifest)
    for shard in (*manifest.shards, *manifest.deltas):
        if await office.blobs.size(shard.digest) != shard.size_bytes:
            raise Malformed(f"shard {shard.digest[:12]} is stored with another size than the manifest's")
    figures = {name: value for name, value in commit.metrics.items() if math.isfinite(value)}  # JSON has no others
    changed = await office.write(
        lambda c: compose.commit_step(
            c, office.book, digest, manifest, msgspec.structs.replace(commit, metrics=figures), office.clock()
        )
    )
    if changed:
        office.metrics.note_step(manifest, figures, office.clock())
        await _collect(office)
    return m.Done(changed=changed)


async def _check_base(office: Office, manifest: m.Manifest) -> None:
    """Refuse a difference to anything but the step before. Raises Conflict."""
    if manifest.deltas:
        signed = await office.database.read(lambda c: views.manifest(c, office.book.run, manifest.parent))
        try:
            check_follows(manifest, open_manifest(signed, office.weights_keys, office.book.run, manifest.parent))
        except WeightsError as error:
            raise Conflict(str(error)) from error


async def _collect(office: Office) -> None:
    """Delete the shards that no version in use needs."""
    spent, first = await office.database.read(lambda c: shard_gc.spent(c, office.book, office.collected_step))
    await office.blobs.delete(spent)
    office.collected_step = first
    if spent:
        log.info("collected shards=%d before_step=%d", len(spent), first)
