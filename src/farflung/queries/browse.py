"""Pages of rollouts, weights and ledger: one bounded query each. Read only."""

import json
from dataclasses import dataclass
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.protocol.identity import Signed
from farflung.protocol.messages import Manifest
from farflung.queries import params
from farflung.queries.redact import SHOWN_AS, Redaction
from farflung.store import ledger
from farflung.store.tables import ENTRIES, GROUPS, LEASES, NODES, ROLLOUTS, STEPS, TASKS

ROLLOUTS_A_PAGE = 25
STEPS_A_PAGE = 20
ENTRIES_A_PAGE = 50
RARE = 5000
"""A status with fewer rollouts than this is found by its own index and sorted, not by walking all leases."""


# --- rollouts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """Which rollouts a page asks for. `older` and `newer` are cursors, `TIME~ROLLOUT`."""

    status: str = ""
    node: str = ""
    older: str = ""
    newer: str = ""


@dataclass(frozen=True)
class RolloutPage:
    """Rollouts, newest lease first, and cursors to the pages beside it."""

    rows: list[Any]
    older: str
    newer: str


def rollouts(connection: Connection, run: str, wanted: Wanted, known: int, redaction: Redaction) -> RolloutPage:
    """One page. `known` is about how many there are of the wanted status."""
    is_rare = bool(wanted.node) or 0 < known < RARE
    # An expression hides its column from the planner, which then walks the index that suits: newest leases first and
    # whatever of them fits, or the few that fit, sorted.
    opened = LEASES.c.opened_at + 0.0 if is_rare else LEASES.c.opened_at
    status = ROLLOUTS.c.status if is_rare else ROLLOUTS.c.status.concat("")
    is_back = bool(wanted.newer)
    query = _columns(redaction).where(LEASES.c.run == run)
    if wanted.status:
        shown = ("held", SHOWN_AS) if redaction.is_on and wanted.status in ("held", SHOWN_AS) else (wanted.status,)
        query = query.where(
            ROLLOUTS.c.run.concat("") == run if not is_rare else ROLLOUTS.c.run == run, status.in_(shown)
        )
    if wanted.node:
        query = query.where(ROLLOUTS.c.node == wanted.node)
    cursor = params.cursor(wanted.newer or wanted.older)
    if cursor is not None:
        at, rollout = cursor
        beyond, later = (
            (opened > at, ROLLOUTS.c.rollout > rollout) if is_back else (opened < at, ROLLOUTS.c.rollout < rollout)
        )
        bound = opened >= at if is_back else opened <= at
        query = query.where(bound, sa.or_(beyond, later))
    orders = (opened, ROLLOUTS.c.rollout) if is_back else (opened.desc(), ROLLOUTS.c.rollout.desc())
    rows: list[Any] = list(connection.execute(query.order_by(*orders).limit(ROLLOUTS_A_PAGE + 1)))
    has_more = len(rows) > ROLLOUTS_A_PAGE
    rows = rows[:ROLLOUTS_A_PAGE]
    if is_back:
        rows.reverse()
    return RolloutPage(
        rows,
        older=_mark(rows[-1]) if rows and (has_more or is_back) else "",
        newer=_mark(rows[0]) if rows and cursor is not None and (has_more or not is_back) else "",
    )


def _columns(redaction: Redaction) -> Any:
    r = ROLLOUTS.c
    return (
        sa.select(
            *(r.rollout, r.group, r.sample, r.lease, r.node, redaction.status()),
            *(r.is_reissue, r.submission, r.position),
            *(r.tokens, r.reward, r.parts, r.answer, LEASES.c.step, LEASES.c.purpose, LEASES.c.opened_at),
            *(GROUPS.c.task, GROUPS.c.batch_step, TASKS.c.prompt, NODES.c.name),
        )
        .select_from(LEASES)
        .join(ROLLOUTS, r.lease == LEASES.c.lease)
        .join(GROUPS, GROUPS.c.group == r.group)
        .join(TASKS, TASKS.c.task == GROUPS.c.task)
        .join(NODES, NODES.c.node == r.node, isouter=True)
    )


def rollout(connection: Connection, id: str, redaction: Redaction) -> Row[Any] | None:
    """One rollout with its prompt."""
    return connection.execute(_columns(redaction).where(ROLLOUTS.c.rollout == id)).first()


def siblings(
    connection: Connection, which: sa.ColumnElement[bool], redaction: Redaction, limit: int = 256
) -> list[Any]:
    """Rollouts of one group, lease, audit or submission."""
    query = _columns(redaction).where(which).order_by(ROLLOUTS.c.group, ROLLOUTS.c.sample)
    return list(connection.execute(query.limit(limit)))


def _mark(row: Row[Any]) -> str:
    return f"{row.opened_at!r}~{row.rollout}"


# --- weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Version:
    """One policy step: its weights and the nodes that they were trained by."""

    id: str
    step: int
    manifest_digest: str
    weights_digest: str
    committed_at: float
    kind: str
    full_bytes: int
    delta_bytes: int
    reward: float
    groups: int
    rollouts: int
    submissions: int
    nodes: int
    loaded: int
    """Nodes that have it loaded."""


def weights(connection: Connection, run: str, until: int, loaded: dict[int, int]) -> list[Version]:
    """Committed steps up to one, newest first, one page of them."""
    query = (
        sa.select(STEPS)
        .where(STEPS.c.run == run, STEPS.c.status == "committed", STEPS.c.step <= until)
        .order_by(STEPS.c.step.desc())
        .limit(STEPS_A_PAGE)
    )
    rows = list(connection.execute(query))
    trained = _trained(connection, run, [row.step for row in rows])
    return [_version(row, trained.get(row.step, (0, 0, 0, 0)), loaded.get(row.step, 0)) for row in rows]


def _trained(connection: Connection, run: str, steps: list[int]) -> dict[int, tuple[int, int, int, int]]:
    """Groups, rollouts, submissions and nodes that each step was trained on."""
    query = (
        sa.select(
            GROUPS.c.batch_step,
            sa.func.count(GROUPS.c.group.distinct()),
            sa.func.count(),
            sa.func.count(ROLLOUTS.c.submission.distinct()),
            sa.func.count(ROLLOUTS.c.node.distinct()),
        )
        .join(ROLLOUTS, ROLLOUTS.c.group == GROUPS.c.group)
        .where(GROUPS.c.run == run, GROUPS.c.batch_step.in_(steps), ROLLOUTS.c.status.in_(("batched", "trained")))
        .group_by(GROUPS.c.batch_step)
    )
    return {row[0]: (row[1], row[2], row[3], row[4]) for row in connection.execute(query)}


def _version(row: Row[Any], trained: tuple[int, int, int, int], loaded: int) -> Version:
    manifest = open_unchecked(row.manifest)
    groups, rollouts, submissions, nodes = trained
    return Version(
        id=row.id,
        step=row.step,
        manifest_digest=row.manifest_digest,
        weights_digest=row.weights_digest,
        committed_at=row.committed_at,
        kind=manifest.kind,
        full_bytes=manifest.full_bytes,
        delta_bytes=manifest.delta_bytes,
        reward=row.seen_reward,
        groups=groups,
        rollouts=rollouts,
        submissions=submissions,
        nodes=nodes,
        loaded=loaded,
    )


def open_unchecked(sealed: bytes) -> Manifest:
    """A manifest out of the coordinator's own database, which checked it when it was committed."""
    return msgspec.msgpack.decode(msgspec.msgpack.decode(sealed, type=Signed).payload, type=Manifest)


def contributors(connection: Connection, run: str, step: int) -> list[Any]:
    """Nodes whose rollouts a step was trained on: node, name, rollouts, submissions, tokens; most rollouts first."""
    count = sa.func.count()
    query = (
        sa.select(
            *(ROLLOUTS.c.node, NODES.c.name, count.label("rollouts")),
            sa.func.count(ROLLOUTS.c.submission.distinct()).label("submissions"),
            sa.func.sum(ROLLOUTS.c.tokens).label("tokens"),
        )
        .select_from(GROUPS)
        .join(ROLLOUTS, ROLLOUTS.c.group == GROUPS.c.group)
        .join(NODES, NODES.c.node == ROLLOUTS.c.node)
        .where(GROUPS.c.run == run, GROUPS.c.batch_step == step, ROLLOUTS.c.status.in_(("batched", "trained")))
        .group_by(ROLLOUTS.c.node, NODES.c.name)
        .order_by(count.desc())
    )
    return list(connection.execute(query.limit(500)))


# --- ledger ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accounts:
    """Balances: one line per node, the two of the house, and the sum of all, which is zero."""

    issued: int
    burned: int
    total: int
    nodes: list[tuple[str, str, int, int]]
    """Node, name, credit, escrow; richest first."""


def accounts(connection: Connection) -> Accounts:
    """Every account, folded by node."""
    balances = ledger.balances(connection)
    names = {row[0]: row[1] for row in connection.execute(sa.select(NODES.c.node, NODES.c.name))}
    owners = {account.partition(":")[2] for account in balances if ":" in account}
    lines = [
        (node, names.get(node, node), balances.get(ledger.credit(node), 0), balances.get(ledger.escrow(node), 0))
        for node in owners
    ]
    return Accounts(
        issued=balances.get(ledger.ISSUED, 0),
        burned=balances.get(ledger.BURNED, 0),
        total=sum(balances.values()),
        nodes=sorted(lines, key=lambda line: -(line[2] + line[3])),
    )


def entries(connection: Connection, before: int) -> list[Row[Any]]:
    """Entries with an id below `before` (0: the newest), newest first."""
    query = sa.select(ENTRIES).order_by(ENTRIES.c.id.desc()).limit(ENTRIES_A_PAGE)
    return list(connection.execute(query.where(ENTRIES.c.id < before) if before else query))


def parts(text: str | None) -> dict[str, float]:
    """Reward parts as stored."""
    return json.loads(text) if text else {}
