"""Versions of the weights as people see them: bytes whole and as a difference, the nodes that have them. Read only."""

from collections.abc import Sequence

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.protocol.messages import Heartbeat, Manifest, NodeError, VersionView, Weights
from farflung.queries.browse import Version, open_unchecked
from farflung.store.run import RunContext
from farflung.store.tables import NODES, STEPS

SHOWN, ASKED = 50, 1000
POOR_RATIO = 20.0
"""Whole over difference below which the page says why."""


def versions(connection: Connection, run_ctx: RunContext, now: float) -> Weights:
    """The latest versions, newest first."""
    loaded = _loaded(connection, now - run_ctx.config.lease.lost_s)
    query = sa.select(STEPS.c.manifest_digest, STEPS.c.manifest, STEPS.c.committed_at).where(
        STEPS.c.run == run_ctx.run, STEPS.c.status == "committed"
    )
    rows = connection.execute(query.order_by(STEPS.c.step.desc()).limit(SHOWN))
    found = [_view(digest, open_unchecked(sealed), at, loaded) for digest, sealed, at in rows]
    return Weights(
        versions=found,
        nodes=sum(loaded.values()),
        node_errors=node_errors(connection, now - run_ctx.config.lease.lost_s),
        note="" if run_ctx.config.learn.lora_rank else why_large(run_ctx.config.learn.lr, found),
        now=now,
    )


def node_errors(connection: Connection, since: float) -> list[NodeError]:
    """Faults with weights, in the words of nodes heard since a time, those heard last first."""
    query = sa.select(NODES.c.node, NODES.c.name, NODES.c.heartbeat).where(
        NODES.c.seen_at >= since, NODES.c.heartbeat != b""
    )
    found: list[NodeError] = []
    for node, name, heartbeat in connection.execute(query.order_by(NODES.c.seen_at.desc()).limit(ASKED)):
        said = msgspec.msgpack.decode(heartbeat, type=Heartbeat).last_error
        found += [NodeError(node=node, name=name, said=said)] if said else []
    return found[:SHOWN]


def why_large(lr: float, found: Sequence[VersionView | Version]) -> str:
    """One line for a run whose differences are large, empty for others.

    An optimizer's step is about the learning rate, and bfloat16 shows it in values whose half last place it exceeds:
    those below 256 times the learning rate.
    """
    ratios = [view.full_bytes / view.delta_bytes for view in found if view.delta_bytes]
    if not ratios or max(ratios) >= POOR_RATIO:
        return ""
    return (
        f"Differences are large because a step of {lr:g} shows in every bfloat16 weight below about {256 * lr:.2g}, "
        "which is most of a small model; at the 1e-6 usual for large ones it shows in one of 250, and 500 times less "
        "than a whole copy travels."
    )


def _loaded(connection: Connection, since: float) -> dict[int, int]:
    query = (
        sa.select(NODES.c.loaded_step, sa.func.count().label("nodes"))
        .where(NODES.c.seen_at >= since, NODES.c.phase != "gone", NODES.c.loaded_step >= 0)
        .group_by(NODES.c.loaded_step)
    )
    return {row.loaded_step: row.nodes for row in connection.execute(query)}


def _view(digest: str, manifest: Manifest, published_at: float, loaded: dict[int, int]) -> VersionView:
    return VersionView(
        step=manifest.step,
        manifest=digest,
        full_bytes=manifest.full_bytes,
        anchor_bytes=manifest.anchor_bytes,
        delta_bytes=manifest.delta_bytes,
        nodes=loaded.get(manifest.step, 0),
        published_at=published_at,
    )
