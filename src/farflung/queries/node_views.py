"""Figures of each node, in one pass over the database's tallies. Read only."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.config import Config
from farflung.queries.redact import Redaction
from farflung.store import ledger
from farflung.store.tables import AUDIT_COUNTS, AUDITS, LEASES, NODES, ROLLOUT_COUNTS
from farflung.trust import evidence
from farflung.trust.record import NodeRecord

PAID = ("accepted", "batched", "trained", "dropped")
SHADES = 7
"""Shades between no evidence and ejection."""


@dataclass(frozen=True)
class Tally:
    """Rollouts of a run, counted by node and status."""

    statuses: dict[str, int]
    done: dict[str, int]
    """Accepted rollouts by node."""
    bad: dict[str, int]
    """Rejected and void ones."""
    scored: dict[str, tuple[int, int]]
    """Accepted rollouts with a reward, and their tokens, by node."""


def tally(connection: Connection, run: str) -> Tally:
    """Count rollouts, by what is kept of them."""
    kept = ROLLOUT_COUNTS.c
    query = sa.select(kept.node, kept.status, kept.count, kept.scored, kept.tokens)
    found = Tally(defaultdict(int), defaultdict(int), defaultdict(int), {})
    for node, status, count, scored, tokens in connection.execute(query.where(kept.run == run, kept.count > 0)):
        found.statuses[status] += count
        if status in PAID:
            found.done[node] += count
            before = found.scored.get(node, (0, 0))
            found.scored[node] = before[0] + scored, before[1] + tokens
        elif status in ("rejected", "void"):
            found.bad[node] += count
    return found


@dataclass(frozen=True)
class NodeLine:
    """One node, one line of the table."""

    node: str
    name: str
    role: str
    status: str
    engine: str
    profile: str
    hardware: str
    url: str
    phase: str
    loaded_step: int
    lag: int | None
    """Steps behind the latest; None while nothing is loaded."""
    tokens_per_s: float
    accepted: int
    rejected: int
    audits: int
    record: NodeRecord = field(repr=False)
    limit: float
    """M at which the node is ejected."""
    credit: int
    escrow: int
    lease: str
    seen_s_ago: float
    registered_at: float
    is_online: bool

    @property
    def is_worker(self) -> bool:
        """Whether it is one that trust is kept of."""
        return self.role == "worker"

    @property
    def is_present(self) -> bool:
        """Whether it is heard of and has not said goodbye."""
        return self.is_online and self.phase != "gone"

    @property
    def residual(self) -> float | None:
        """log10 M, None before the first audit."""
        return math.log10(self.record.statistic) if self.record.statistic > 0 else None

    @property
    def shade(self) -> int:
        """Shade of the evidence: 0 where M ≤ 1 (none), HEATS − 1 where it ejects, even steps of log M between."""
        share = max(0.0, self.residual or 0.0) / math.log10(self.limit)
        return min(SHADES - 1, math.ceil(share * (SHADES - 1) - 1e-9))

    @property
    def state(self) -> str:
        """Its phase in one word, as the strip and the table colour it."""
        if self.status == "ejected":
            return "ejected"
        if self.phase == "gone":
            return "gone"
        return (self.phase.split() or ["joined"])[0] if self.is_online else "silent"


def lines(
    connection: Connection, config: Config, counts: Tally, latest: int, now: float, redaction: Redaction
) -> list[NodeLine]:
    """Every node, trusted roles first, then in the order of joining."""
    rows = connection.execute(sa.select(NODES).order_by(NODES.c.role, NODES.c.registered_at)).all()
    held = sa.select(LEASES.c.node, LEASES.c.lease).where(LEASES.c.run == config.run.name, LEASES.c.status == "open")
    audits = _audited(connection, config.run.name, redaction)
    leases = {row[0]: row[1] for row in connection.execute(held)}
    accounts = ledger.balances(connection)

    def node_line(row: Row[Any]) -> NodeLine:
        silent_s = now - row.seen_at
        return NodeLine(
            node=row.node,
            name=row.name,
            role=row.role,
            status=row.status,
            engine=row.engine,
            profile=row.profile,
            hardware=describe(row.hardware),
            url=row.url,
            phase=row.phase,
            loaded_step=row.loaded_step,
            lag=latest - row.loaded_step if row.loaded_step >= 0 else None,
            tokens_per_s=row.tokens_per_s,
            accepted=counts.done.get(row.node, 0),
            rejected=counts.bad.get(row.node, 0),
            audits=audits.get(row.node, 0),
            record=redaction.record(msgspec.msgpack.decode(row.record, type=NodeRecord)),
            limit=evidence.limit(config.trust.false_ejection_probability),
            credit=accounts.get(ledger.credit(row.node), 0),
            escrow=accounts.get(ledger.escrow(row.node), 0),
            lease=leases.get(row.node, ""),
            seen_s_ago=silent_s,
            registered_at=row.registered_at,
            is_online=silent_s < config.lease.lost_s,
        )

    return [node_line(row) for row in rows]


def _audited(connection: Connection, run: str, redaction: Redaction) -> Counter[str]:
    """Audits by node that are done and may be told of: all that are kept count of but the latest."""
    kept, mine = AUDIT_COUNTS.c, sa.and_(AUDITS.c.run == run, AUDITS.c.status == "done", ~redaction.audits())
    done = sa.select(kept.node, kept.count).where(kept.run == run, kept.status == "done")
    hidden = sa.select(AUDITS.c.node, sa.func.count()).where(mine).group_by(AUDITS.c.node)
    found = Counter({row[0]: row[1] for row in connection.execute(done)})
    found.subtract({row[0]: row[1] for row in connection.execute(hidden)} if redaction.is_on else {})
    return found


@dataclass(frozen=True)
class ProfileLine:
    """All nodes of one numerics profile, as far as their replays may be told of."""

    profile: str
    nodes: int
    ejected: int
    rollouts: int
    flips: int
    allowed: float
    """Flips that honest arithmetic would have made at most, on average."""

    @property
    def share(self) -> float:
        """Flips as a multiple of those; a class that drifts nears 1 before any of it is ejected."""
        return self.flips / self.allowed if self.allowed else 0.0


def by_profile(nodes: Sequence[NodeLine]) -> list[ProfileLine]:
    """Replays by numerics profile, those with the most first; none of profiles whose nodes were not replayed yet."""
    found: dict[str, list[NodeLine]] = defaultdict(list)
    for node in nodes:
        if node.is_worker and node.record.watched.rollouts:
            found[node.profile].append(node)
    lines = [_profile_line(profile, some) for profile, some in found.items()]
    return sorted(lines, key=lambda line: (-line.rollouts, line.profile))


def _profile_line(profile: str, nodes: Sequence[NodeLine]) -> ProfileLine:
    watched = [node.record.watched for node in nodes]
    ejected = sum(node.status == "ejected" for node in nodes)
    rollouts, flips = (sum(getattr(one, name) for one in watched) for name in ("rollouts", "flips"))
    return ProfileLine(profile, len(nodes), ejected, rollouts, flips, sum(one.allowed for one in watched))


def describe(hardware: str) -> str:
    """A node's account of its machine, in a few words."""
    said = json.loads(hardware or "{}")
    memory = (said.get("accelerator_bytes") or said.get("memory_bytes", 0)) / 2**30
    parts = [f"{said['devices']} devices" if said.get("devices", 1) > 1 else ""]
    parts += [said.get("accelerator", ""), said.get("cpu", "") if not said.get("accelerator") else ""]
    parts += [f"{said['cores']} cores" if said.get("cores") else "", f"{memory:.0f} GiB" if memory >= 0.5 else ""]
    parts += [said.get("precision", ""), said.get("driver", "")]
    expected = said.get("expected_tokens_per_s", 0)
    parts += [f"{expected:,.0f} tok/s expected" if expected else ""]
    return ", ".join(part for part in parts if part)


# --- sorting ---------------------------------------------------------------------------------------------------------

ORDER = ("trainer", "validator", "scorer", "relay", "worker")
SORTS: dict[str, Callable[[NodeLine], Any]] = {
    "role": lambda n: ORDER.index(n.role) if n.role in ORDER else len(ORDER),
    "name": lambda n: n.name.lower(),
    "status": lambda n: n.status,
    "hardware": lambda n: n.hardware.lower(),
    "engine": lambda n: n.engine,
    "profile": lambda n: n.profile,
    "phase": lambda n: n.state,
    "lag": lambda n: 10**9 if n.lag is None else n.lag,
    "speed": lambda n: n.tokens_per_s,
    "accepted": lambda n: n.accepted,
    "rejected": lambda n: n.rejected,
    "residual": lambda n: n.record.statistic,
    "credit": lambda n: n.credit + n.escrow,
    "seen": lambda n: n.seen_s_ago,
}
DESCENDING = ("speed", "accepted", "rejected", "residual", "credit")
"""Columns where people look for the largest first."""


def ordered(found: list[NodeLine], sort: str, is_descending: bool) -> list[NodeLine]:
    """Sorted by a column; equals keep the order of joining."""
    return sorted(found, key=SORTS.get(sort, SORTS["role"]), reverse=is_descending)
