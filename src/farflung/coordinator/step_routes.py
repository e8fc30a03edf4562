"""Routes for the trainer: a step from its batch to its commit."""

import asyncio
import logging
import math
from functools import partial

import msgspec
from sqlalchemy import Connection
from starlette.responses import Response

from farflung.audits import steering
from farflung.coordinator.context import Context, digest_in, number_in
from farflung.net.server import Call
from farflung.protocol import messages as m
from farflung.protocol.digest import digest_of
from farflung.protocol.errors import Conflict, Malformed, NotFound, WeightsError
from farflung.queries import views
from farflung.rollouts import commit, select
from farflung.tasks import draw
from farflung.tasks.curriculum import Drawn
from farflung.weights import shard_gc
from farflung.weights.manifest import check_follows, manifest_digest, open_manifest

log = logging.getLogger(__name__)


async def claim_step(ctx: Context, call: Call) -> m.BatchAnswer:
    """The batch of a step for the trainer; asked again, the same one."""
    ctx.require(call, "trainer")
    step = number_in(call, "step")

    def claim(connection: Connection) -> m.BatchAnswer:
        found = select.claim_step(connection, ctx.run_ctx, step, ctx.clock())
        latest = ctx.run_ctx.latest(connection)
        if isinstance(found, str):
            return m.BatchAnswer(latest=latest, reason=found)
        return m.BatchAnswer(latest=latest, batch=found)

    return await ctx.long_poll.poll(
        "step", partial(ctx.database.write, claim), lambda answer: answer.batch is not None, call.message.wait_s
    )


async def submission_body(ctx: Context, call: Call) -> Response:
    """The tokens of a submission, for the trainer."""
    ctx.require(call, "trainer")
    return Response(await ctx.archive.blobs.get(digest_in(call)), media_type="application/octet-stream")


async def logp_body(ctx: Context, call: Call) -> Response:
    """The log-probabilities that a node sent along with a submission, for the trainer's mismatch metric."""
    ctx.require(call, "trainer")
    blob = await ctx.database.read(lambda c: views.logp_blob(c, digest_in(call)))
    try:
        found = await ctx.archive.blobs.get(blob) if blob else b""
    except NotFound:  # the same bytes, sent with a refused submission, were collected meanwhile: a metric less
        found = b""
    return Response(found, media_type="application/octet-stream")


async def trip(ctx: Context, call: Call) -> m.Done:
    """The trainer's tripwire: submissions that leave the batch and are audited in full, and what all replays found."""
    ctx.require(call, "trainer")
    step, caught, looked = number_in(call, "step"), call.message.submissions, call.message.looked

    def take(connection: Connection) -> int:
        tripped = select.trip(connection, ctx.run_ctx, step, caught, ctx.clock())
        return tripped + steering.count_replays(connection, ctx.run_ctx, ctx.profiles, step, looked, ctx.clock())

    return m.Done(changed=await ctx.write(take))


async def put_blob(ctx: Context, call: Call) -> m.Done:
    """The trainer stores a shard under its digest."""
    ctx.require(call, "trainer")
    digest = digest_in(call)
    found = await asyncio.to_thread(digest_of, call.body)
    if found != digest:
        raise Malformed(f"the body hashes to {found[:12]}, not to {digest[:12]} of the path")
    await ctx.blobs.put(call.body, digest)
    return m.Done(changed=1)


async def commit_step(ctx: Context, call: Call) -> m.Done:
    """End a step: its weights are published, its rollouts trained."""
    ctx.require(call, "trainer")
    said: m.Commit = call.message
    digest = manifest_digest(said.manifest)
    try:
        manifest = open_manifest(said.manifest, ctx.weights_keys, ctx.run_ctx.run, digest)
    except WeightsError as error:
        raise Malformed(str(error)) from error
    if manifest.step != number_in(call, "step"):
        raise Malformed(f"the manifest is of step {manifest.step}, the path of {call.path['step']}")
    await _check_base(ctx, manifest)
    for shard in (*manifest.shards, *manifest.deltas):
        if await ctx.blobs.size(shard.digest) != shard.size_bytes:
            raise Malformed(f"shard {shard.digest[:12]} is stored with another size than the manifest's")
    figures = {name: value for name, value in said.metrics.items() if math.isfinite(value)}  # JSON has no others
    said = msgspec.structs.replace(said, metrics=figures)

    def settle(c: Connection) -> tuple[int, list[Drawn]]:
        changed = commit.commit_step(c, ctx.run_ctx, digest, manifest, said, ctx.clock())
        return changed, draw.settle(c, ctx.run_ctx, manifest.step) if changed else []

    changed, drawn = await ctx.write(settle)
    if changed:
        ctx.metrics.note_step(manifest, figures, ctx.clock())
        ctx.metrics.note_drawn(manifest.step, drawn, ctx.clock())
        await _delete_unneeded(ctx)
    return m.Done(changed=changed)


async def _check_base(ctx: Context, manifest: m.Manifest) -> None:
    """Refuse a difference to anything but the step before. Raises Conflict."""
    if manifest.deltas:
        signed = await ctx.database.read(lambda c: views.manifest(c, ctx.run_ctx.run, manifest.parent))
        try:
            check_follows(manifest, open_manifest(signed, ctx.weights_keys, ctx.run_ctx.run, manifest.parent))
        except WeightsError as error:
            raise Conflict(str(error)) from error


async def _delete_unneeded(ctx: Context) -> None:
    """Delete the shards that no version in use needs."""
    spent, first = await ctx.database.read(lambda c: shard_gc.spent(c, ctx.run_ctx, ctx.collected_step))
    await ctx.blobs.delete(spent)
    ctx.collected_step = first
    if spent:
        log.info("collected shards=%d before_step=%d", len(spent), first)
