"""Invariants of a run's database, for any fate of its processes; docs/operate.md states them for people."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.config import Config
from farflung.protocol.errors import FarflungError
from farflung.protocol.identity import Signed
from farflung.protocol.messages import Receipt
from farflung.protocol.states import REOPENING
from farflung.rollouts.receipts import FILE
from farflung.store import counts, ledger
from farflung.store.tables import ENTRIES, EVENTS, LEASES, ROLLOUTS, STEPS, SUBMISSIONS
from farflung.tasks.create_run import weights_key
from farflung.weights.manifest import open_manifest

KEPT = ("accepted", "batched", "trained", "dropped", "held", "void", "rejected")
"""States that an accepted rollout may have reached: none that would let its sample be leased once more unseen."""


def violations(connection: Connection, config: Config) -> list[str]:
    """Everything that does not hold, one sentence each."""
    return [
        *_trained_once(connection),
        *_none_vanished(connection),
        *_ledger(connection),
        *counts.differences(connection),
        *_weights(connection, config),
        *_one_owner(connection),
        *_one_lease(connection),
        *_receipts(connection, config.folder),
    ]


def _trained_once(connection: Connection) -> Iterator[str]:
    of = sa.and_(EVENTS.c.noun == "rollout", EVENTS.c.after == "trained")
    for rollout, count in Counter(connection.execute(sa.select(EVENTS.c.subject).where(of)).scalars()).items():
        if count > 1:
            yield f"rollout {rollout} was trained on {count} times"
    query = sa.select(ROLLOUTS.c.rollout).where(ROLLOUTS.c.status == "trained", ROLLOUTS.c.reward.is_(None))
    for rollout in connection.execute(query).scalars():
        yield f"rollout {rollout} was trained on without a reward"


def _none_vanished(connection: Connection) -> Iterator[str]:
    of = sa.and_(EVENTS.c.noun == "rollout", EVENTS.c.after == "accepted")
    query = sa.select(EVENTS.c.subject, ROLLOUTS.c.status).select_from(
        EVENTS.outerjoin(ROLLOUTS, ROLLOUTS.c.rollout == EVENTS.c.subject)
    )
    for rollout, status in connection.execute(query.where(of)):
        if status not in KEPT:
            yield f"rollout {rollout} was accepted and is {status or 'gone'}"


def _ledger(connection: Connection) -> Iterator[str]:
    balances = ledger.balances(connection)
    if total := sum(balances.values()):
        yield f"all accounts sum to {total}"
    for account, tokens in balances.items():
        if tokens < 0 and account != ledger.ISSUED:
            yield f"account {account} holds {tokens}"
    causes = sa.select(ENTRIES.c.cause).where(ENTRIES.c.account == ledger.ISSUED)
    for cause, count in Counter(connection.execute(causes).scalars()).items():
        if count > 1:
            yield f"rollout {cause} was paid for {count} times"


def _weights(connection: Connection, config: Config) -> Iterator[str]:
    """Every committed step has a manifest sealed by the trainer, which names the step before and these weights."""
    parent = ""
    query = sa.select(STEPS).where(STEPS.c.run == config.run.name, STEPS.c.status == "committed")
    for row in connection.execute(query.order_by(STEPS.c.step)):
        try:
            signed = msgspec.msgpack.decode(row.manifest, type=Signed)
            manifest = open_manifest(signed, weights_key(config), config.run.name, row.manifest_digest)
        except FarflungError as error:
            yield f"step {row.step}: {error}"
            continue
        if (manifest.step, manifest.parent, manifest.digest) != (row.step, parent, row.weights_digest):
            yield f"step {row.step} has a manifest of step {manifest.step} that follows {manifest.parent[:12]!r}"
        parent = row.manifest_digest


def _one_owner(connection: Connection) -> Iterator[str]:
    """A sample's next rollout is leased only after the one before ended."""
    ended = {
        row.subject: row.id
        for row in connection.execute(
            sa.select(EVENTS.c.subject, EVENTS.c.id).where(EVENTS.c.noun == "rollout", EVENTS.c.after.in_(REOPENING))
        )
    }
    leased = sa.and_(EVENTS.c.noun == "rollout", EVENTS.c.after == "leased")
    query = sa.select(ROLLOUTS.c.group, ROLLOUTS.c.sample, ROLLOUTS.c.rollout, EVENTS.c.id).join(
        ROLLOUTS, ROLLOUTS.c.rollout == EVENTS.c.subject
    )
    before: dict[tuple[str, int], str] = {}
    for group, sample, rollout, at in connection.execute(query.where(leased).order_by(EVENTS.c.id)):
        earlier = before.get((group, sample))
        if earlier is not None and ended.get(earlier, at) >= at:
            yield f"sample {sample} of group {group} was leased as {rollout} while it was {earlier}"
        before[group, sample] = rollout


def _one_lease(connection: Connection) -> Iterator[str]:
    """The next lease of each of a node's devices is opened only after the one before ended."""
    query = sa.select(EVENTS.c.subject, EVENTS.c.after, LEASES.c.node, LEASES.c.device).join(
        LEASES, LEASES.c.lease == EVENTS.c.subject
    )
    held: dict[str, set[str]] = defaultdict(set)
    for lease, after, node, device in connection.execute(query.where(EVENTS.c.noun == "lease").order_by(EVENTS.c.id)):
        if after != "open":
            held[node, device].discard(lease)
            continue
        if held[node, device]:
            yield f"device {device} of node {node} was given lease {lease} while it held {held[node, device]}"
        held[node, device].add(lease)


def _receipts(connection: Connection, folder: Path) -> Iterator[str]:
    """Each submission that workers on this machine were acknowledged is in the database, once."""
    known = Counter((row.lease, row.submission) for row in connection.execute(sa.select(SUBMISSIONS)))
    for path in sorted(folder.glob(f"nodes/*/{FILE}")):
        for receipt in _decoded(path.read_bytes().splitlines()):
            if (times := known[receipt.lease, receipt.submission]) != 1:
                yield f"lease {receipt.lease}: submission {receipt.submission[:12]} was acknowledged, {times} are there"


def _decoded(lines: Sequence[bytes]) -> Iterator[Receipt]:
    for line in lines:
        try:
            yield msgspec.msgpack.decode(msgspec.json.decode(line, type=Signed).payload, type=Receipt)
        except msgspec.DecodeError:
            continue  # cut short by a kill
