"""Coordinator: when a lease lapses, by its node's measured speed at first, and later while it makes progress.

Progress is the node's own word. So it buys time up to a limit only, and half as much after each lease that lately came
to nothing: a node that claims and never delivers soon holds samples hardly longer than one that says nothing.
"""

from collections.abc import Collection, Sequence
from typing import Any

import msgspec
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
"""A node as it was before its heartbeat, and the heartbeat."""


def longest_s(config: Config, lapsed: int) -> float:
    """The longest life of a lease, whatever its node says, after so many that it lately let lapse."""
    return max(config.lease.lease_s, config.deadline_s / 2.0 ** min(lapsed, 30))


def first_s(config: Config, tokens: int, tokens_per_s: float, lapsed: int) -> float:
    """The life of a lease of at most so many tokens without a sign of progress; the speed is 0 before it is known."""
    needed_s = tokens / tokens_per_s if tokens_per_s else 0.0
    return min(max(config.lease.lease_s, needed_s), longest_s(config, lapsed))


def is_progress(before: Heartbeat, after: Heartbeat) -> bool:
    """Whether work on the lease that both name went on: tokens were made, or none yet and weights came."""
    is_fetching = after.made == 0 and after.fetched_bytes > before.fetched_bytes
    return before.lease == after.lease and (after.made > before.made or is_fetching)


def first_lives(connection: Connection, run_ctx: RunContext, tokens: dict[str, int], now: float) -> dict[str, float]:
    """For each node, the life of a lease of at most so many tokens."""
    lapsed = _lapsed(connection, run_ctx, tokens, now)
    rows = connection.execute(_SPEEDS, {"ids": list(tokens)})
    return {
        row.node: first_s(run_ctx.config, tokens[row.node], row.tokens_per_s, lapsed.get(row.node, 0)) for row in rows
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
    """Extend the leases on which there was progress; gives the seconds left to each node that named its own."""
    named = {row.node: (row, heartbeat) for row, heartbeat in heard if heartbeat.lease}
    if not named:
        return {}
    asked = {"ids": [heartbeat.lease for _, heartbeat in named.values()], "of": run_ctx.run}
    held = [row for row in connection.execute(_OPEN, asked) if row.node in named]
    soon = now + RENEWED_AT * run_ctx.config.lease.lease_s
    due = [lease for lease in held if lease.expires_at < soon and _has_gone_on(lease, *named[lease.node])]
    expires_at = {lease.lease: lease.expires_at for lease in held} | _extend(connection, run_ctx, due, now)
    return {lease.node: max(0.0, expires_at[lease.lease] - now) for lease in held}


_OPEN = sa.select(LEASES).where(
    LEASES.c.lease.in_(sa.bindparam("ids", expanding=True)),
    LEASES.c.run == sa.bindparam("of"),
    LEASES.c.status == "open",
)


def _has_gone_on(lease: Row[Any], node: Row[Any], heartbeat: Heartbeat) -> bool:
    if heartbeat.lease != lease.lease or not node.heartbeat:
        return False
    return is_progress(msgspec.msgpack.decode(node.heartbeat, type=Heartbeat), heartbeat)


def _extend(connection: Connection, run_ctx: RunContext, due: Sequence[Row[Any]], now: float) -> dict[str, float]:
    """When these leases lapse now; one whose rollouts no step can take any more lapses as it would have."""
    if not due:
        return {}
    config, latest = run_ctx.config, run_ctx.latest(connection).step
    oldest = latest - config.learn.max_staleness - config.learn.lockstep
    due = [lease for lease in due if lease.purpose != "train" or lease.step >= oldest]
    lapsed = _lapsed(connection, run_ctx, [lease.node for lease in due], now)
    found: dict[str, float] = {}
    for lease in due:
        last = lease.opened_at + longest_s(config, lapsed.get(lease.node, 0))
        found[lease.lease] = max(lease.expires_at, min(last, now + config.lease.lease_s))
    update_rows(connection, LEASES, [{"lease": lease, "expires_at": at} for lease, at in found.items()])
    return found
