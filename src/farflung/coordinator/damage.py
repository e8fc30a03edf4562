"""Coordinator, as it starts: finds weights and submissions that a disk has damaged and the run still needs.

Lost weights are published again: the next step restores the latest one and is an anchor. Lost submissions are leased
again; the nodes that made them keep the pay. A shared store looks after its own bytes and is not read through.
"""

import asyncio
import logging
from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.audits import penalties, rollback
from farflung.protocol.digest import digest_of
from farflung.protocol.errors import Conflict, NotFound
from farflung.rollouts.unscorable import warn
from farflung.store.blobs import Blobs
from farflung.store.db import Database
from farflung.store.run import RunContext
from farflung.store.tables import AUDITS, ROLLOUTS
from farflung.weights import shard_gc

log = logging.getLogger(__name__)
UNTRAINED = ("held", "received", "accepted", "batched")


async def mend(database: Database, run_ctx: RunContext, blobs: Blobs, bodies: Blobs, now: float) -> None:
    """Find what is damaged and have it made again."""
    if blobs.is_shared:
        return
    for step, digests in (await database.read(lambda c: shard_gc.newest(c, run_ctx))).items():
        if damaged := await _damaged(blobs, digests):
            await database.write(lambda c, step=step, lost=damaged: _publish_again(c, run_ctx, step, lost, now))
            break
    if damaged := await _damaged(bodies, await database.read(lambda c: _untrained(c, run_ctx))):
        await database.write(lambda c: _lease_again(c, run_ctx, damaged, now))


async def _damaged(blobs: Blobs, digests: Sequence[str]) -> list[str]:
    return [digest for digest in digests if not await _is_whole(blobs, digest)]


async def _is_whole(blobs: Blobs, digest: str) -> bool:
    try:
        data = await blobs.get(digest)
    except NotFound:
        return False
    return await asyncio.to_thread(digest_of, data) == digest


def _publish_again(connection: Connection, run_ctx: RunContext, step: int, lost: Sequence[str], now: float) -> None:
    """Work under policies that no node can fetch any more is let go. A run that has ended is told of only."""
    said = f"a part of the weights of step {step} is damaged or missing in the blob store ({lost[0][:12]})"
    try:
        number = rollback.restore_latest(connection, run_ctx, step, now)
    except Conflict as error:
        log.warning("%s, and %s", said, error)
        return
    warn(connection, run_ctx, f"{said}; step {number} publishes the latest weights again", now)


def _untrained(connection: Connection, run_ctx: RunContext) -> list[str]:
    """Submissions that a run which goes on may still train on."""
    if run_ctx.status(connection) != "running":
        return []
    query = sa.select(ROLLOUTS.c.submission).where(ROLLOUTS.c.run == run_ctx.run, ROLLOUTS.c.status.in_(UNTRAINED))
    return sorted(set(connection.execute(query).scalars()))


def _lease_again(connection: Connection, run_ctx: RunContext, lost: Sequence[str], now: float) -> None:
    why = "its submission is damaged in the blob store"
    lying = ROLLOUTS.c.submission.in_(lost)
    groups = connection.execute(sa.select(ROLLOUTS.c.group).where(lying, ROLLOUTS.c.status.in_(UNTRAINED))).scalars()
    penalties.reopen(connection, sorted(set(groups)), now, why)
    penalties.withdraw(connection, lying, why, now)
    penalties.cancel_audits(connection, AUDITS.c.submission.in_(lost), now, why)
    said = f"submissions that are damaged or missing in the blob store are made again ({len(lost)})"
    warn(connection, run_ctx, said, now)
