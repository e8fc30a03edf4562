"""Coordinator: when a lease lapses, by its node's measured speed at first, and later while it makes progress.

Progress is the node's own word. So it buys time up to a limit only, and half as much after each lease that lately came
to nothing: a node that claims and never delivers soon holds samples hardly longer than one that says nothing.
"""

from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.config import Config
from farflung.protocol.messages import Heartbeat
from farflung.store.bulk import update_rows
from farflung.store.run import RunContext
from farflung.store.tables import GIVEN_UP, LEASES, NODES

RENEWED_AT = 0.8
"""A lease is extended once less than this share of `lease.lease_s` is left, so that few heartbeats write."""
Heard = tuple[Row[Any], Heartbeat]
"""A node, or a lease of it, and the node's heartbeat."""


def longest_s(config: Config, lapsed: int) -> float:
    """The longest life of a lease, whatever its node says, after so many that it lately let lapse."""
    return max(config.lease.lease_s, config.deadline_s / 2.0 ** min(lapsed, 30))


def first_s(config: Config, tokens: int, tokens_per_s: float, lapsed: int) -> float:
    """The life of a lease of at most so many tokens without a sign of progress; the speed is 0 before it is known."""
    needed_s = tokens / tokens_per_s if tokens_per_s else 0.0
    return min(max(config.lease.lease_s, needed_s), longest_s(config, lapsed))


def first_lives(
    connection: Connection, run_ctx: RunContext, tokens: dict[tuple[str, int], int], now: float
) -> dict[tuple[str, int], float]:
    """By node and device, the life of a lease of at most so many tokens."""
    nodes = sorted({node for node, _ in tokens})
    lapsed = _lapsed(connection, run_ctx, nodes, now)
    speeds = {row.node: row.tokens_per_s for row in connection.execute(_SPEEDS, {"ids": nodes})}
    return {
        (node, device): first_s(run_ctx.config, count, speeds.get(node, 0.0), lapsed.get(node, 0))
        for (node, device), count in tokens.items()
    }


_SPEEDS = sa.select(NODES.c.node, NODES.c.tokens_per_s).where(NODES.c.node.in_(sa.bindparam("ids", expanding=True)))


def _lapsed(connection: Connection, run_ctx: RunContext, nodes: Collection[str], now: float) -> dict[str, int]:
    """How many leases each of these nodes lately let lapse with nothing to show for them."""
    since = now - 2 * run_ctx.config.deadline_s
    rows = connection.execute(_LAPSED, {"ids": list(nodes), "since": since}) if nodes else ()
    return {row[0]: row[1] for row in rows}


_LAPSED = (
    sa.select(LEASES.c.node, sa.func.count())
    .where(
        LEASES.c.node.in_(sa.bindparam("ids", expanding=True)),
        sa.text(GIVEN_UP),  # which has an index
        LEASES.c.status == "expired",
        LEASES.c.opened_at > sa.bindparam("since"),
    )
    .group_by(LEASES.c.node)
)


def renew(connection: Connection, run_ctx: RunContext, heard: Sequence[Heard], now: float) -> dict[str, float]:
    """Extend the leases on which there was progress; gives the seconds left by lease, of those that nodes named."""
    named = {heartbeat.lease: (row.node, heartbeat) for row, heartbeat in heard if heartbeat.lease}
    if not named:
        return {}
    found = connection.execute(_OPEN, {"ids": list(named), "of": run_ctx.run})
    held = [(lease, named[lease.lease][1]) for lease in found if named[lease.lease][0] == lease.node]
    soon = now + RENEWED_AT * run_ctx.config.lease.lease_s
    due = [one for one in held if one[0].expires_at < soon and has_gone_on(*one)]
    expires_at = {lease.lease: lease.expires_at for lease, _ in held} | _extend(connection, run_ctx, due, now)
    return {lease: max(0.0, at - now) for lease, at in expires_at.items()}


_OPEN = sa.select(LEASES).where(
    LEASES.c.lease.in_(sa.bindparam("ids", expanding=True)),
    LEASES.c.run == sa.bindparam("of"),
    LEASES.c.status == "open",
)


def has_gone_on(lease: Row[Any], heartbeat: Heartbeat) -> bool:
    """Whether more was made of a lease than when it was extended last, or none yet, and more weights came."""
    is_fetching = heartbeat.made == 0 and heartbeat.fetched_bytes > lease.fetched_bytes
    return heartbeat.made > lease.made or is_fetching


def _extend(connection: Connection, run_ctx: RunContext, due: Sequence[Heard], now: float) -> dict[str, float]:
    """When these leases lapse now; one whose rollouts no step can take any more lapses as it would have."""
    if not due:
        return {}
    config, latest = run_ctx.config, run_ctx.latest(connection).step
    oldest = latest - config.learn.max_staleness - config.learn.lockstep
    due = [one for one in due if one[0].purpose != "train" or one[0].step >= oldest]
    lapsed = _lapsed(connection, run_ctx, [lease.node for lease, _ in due], now)
    rows: list[dict[str, Any]] = []
    for lease, heartbeat in due:
        last = lease.opened_at + longest_s(config, lapsed.get(lease.node, 0))
        expires_at = max(lease.expires_at, min(last, now + config.lease.lease_s))
        counts = {"made": heartbeat.made, "fetched_bytes": heartbeat.fetched_bytes}
        rows.append({"lease": lease.lease, "expires_at": expires_at} | counts)
    update_rows(connection, LEASES, rows)
    return {row["lease"]: row["expires_at"] for row in rows}
