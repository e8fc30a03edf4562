"""Coordinator: which shards no live version needs any more; those back to the anchor of the oldest in use stay."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.protocol.identity import Signed
from farflung.protocol.messages import Manifest
from farflung.store import evaluations
from farflung.store.run import RunContext
from farflung.store.tables import AUDITS, GROUPS, LEASES, STEPS

SPARE_STEPS = 8
"""Latest steps that stay even when nothing names them: a node may be about to fetch one, a validator to confirm."""


def spent(connection: Connection, run_ctx: RunContext, since: int) -> tuple[list[str], int]:
    """Digests of shards to delete, among those of steps from `since` on, and the first step that stays."""
    oldest = oldest_in_use(connection, run_ctx)
    manifests = dict(_manifests(connection, run_ctx, since))
    return needless(manifests, oldest)


def needed(connection: Connection, run_ctx: RunContext) -> set[str]:
    """Digests of the shards that lead to every version in use."""
    manifests = dict(_manifests(connection, run_ctx, 0))
    _, first = needless(manifests, oldest_in_use(connection, run_ctx))
    return {shard for step, manifest in manifests.items() if step >= first for shard in _names(manifest)}


def newest(connection: Connection, run_ctx: RunContext) -> dict[int, list[str]]:
    """Digests of the shards that lead to the newest version, by step: back to the last anchor, however long the run."""
    found: dict[int, list[str]] = {}
    for step, manifest in _newest_first(connection, run_ctx):
        found[step] = list(_names(manifest))
        if manifest.shards:
            break
    return dict(sorted(found.items()))


def needless(manifests: Mapping[int, Manifest], oldest: int) -> tuple[list[str], int]:
    """Shards that only steps before the last anchor up to `oldest` name, and the step of that anchor. Pure."""
    anchors = [step for step, manifest in manifests.items() if manifest.shards and step <= oldest]
    first = max(anchors, default=min(manifests, default=0))
    live = {shard for step, manifest in manifests.items() if step >= first for shard in _names(manifest)}
    dead = {shard for step, manifest in manifests.items() if step < first for shard in _names(manifest)}
    return sorted(dead - live), first


def oldest_in_use(connection: Connection, run_ctx: RunContext) -> int:
    """The first step that a lease, an audit, a group on its way to a batch or an evaluation still needs."""
    latest = run_ctx.latest(connection).step
    steps = [latest - run_ctx.config.learn.max_staleness - SPARE_STEPS]
    steps += [step for step, _ in evaluations.left(connection, run_ctx.config, latest)]
    for table, statuses in (
        (LEASES, ("open",)),
        (AUDITS, ("open", "claimed")),
        (GROUPS, ("open", "complete", "batched")),
    ):
        is_used = sa.and_(table.c.run == run_ctx.run, table.c.status.in_(statuses))
        if table is GROUPS:
            is_used = sa.and_(is_used, GROUPS.c.purpose == "train")
        first = connection.execute(sa.select(sa.func.min(table.c.step)).where(is_used)).scalar_one()
        steps += [] if first is None else [first]
    return max(0, min(steps))


def _manifests(connection: Connection, run_ctx: RunContext, since: int) -> Iterator[tuple[int, Manifest]]:
    query = sa.select(STEPS.c.step, STEPS.c.manifest).where(
        STEPS.c.run == run_ctx.run, STEPS.c.status == "committed", STEPS.c.step >= since
    )
    for step, sealed in connection.execute(query.order_by(STEPS.c.step)):
        yield step, _opened(sealed)


def _newest_first(connection: Connection, run_ctx: RunContext) -> Iterator[tuple[int, Manifest]]:
    """A few at a time: manifests are large, and the next anchor is near."""
    rows: Sequence[Any] = [(run_ctx.latest(connection).step + 1, b"")]
    while rows := connection.execute(_NEWEST_FIRST, {"of": run_ctx.run, "below": rows[-1][0]}).all():
        yield from ((step, _opened(sealed)) for step, sealed in rows)


_NEWEST_FIRST = (
    sa.select(STEPS.c.step, STEPS.c.manifest)
    .where(STEPS.c.run == sa.bindparam("of"), STEPS.c.status == "committed", STEPS.c.manifest.is_not(None))
    .where(STEPS.c.step < sa.bindparam("below"))
    .order_by(STEPS.c.step.desc())
    .limit(8)
)


def _opened(sealed: bytes) -> Manifest:
    return msgspec.msgpack.decode(msgspec.msgpack.decode(sealed, type=Signed).payload, type=Manifest)


def _names(manifest: Manifest) -> Iterator[str]:
    return (shard.digest for shard in (*manifest.shards, *manifest.deltas))
