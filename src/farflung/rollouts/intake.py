"""Coordinator: take parcels in, one transaction for many, with the audit draw.

A submission is named by the digest of lease, node and tokens. The first one committed for a lease is final; the same
one sent again gets the same receipt.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.audits import budget, node_record, possession
from farflung.audits.audit import Drawn, open_audits
from farflung.protocol import seeds
from farflung.protocol.digest import digest_of
from farflung.protocol.errors import Ejected, Forbidden, LeaseGone, NotFound, Refusal, WrongWeights
from farflung.protocol.identity import Signed, seal
from farflung.protocol.messages import Lease, Receipt
from farflung.rollouts.validate import ValidSubmission
from farflung.store.bulk import insert_rows, update_rows
from farflung.store.run import RunContext, node_rows, unknown_node
from farflung.store.tables import LEASES, NODES, ROLLOUTS, SUBMISSIONS
from farflung.store.transitions import end_leases, record, shift, shift_rows
from farflung.trust.audit_policy import draw
from farflung.trust.evidence import Profiles
from farflung.trust.record import submitted

RECEIPT = "receipt"


@dataclass(frozen=True)
class StoredSubmission:
    """A parcel whose body is stored, on its way into the database."""

    node: str
    parcel: ValidSubmission
    possession: str
    logp: str | None
    """Digest of the stored log-probabilities."""

    @property
    def lease(self) -> str:
        """Id of the lease that it is for."""
        return self.parcel.lease.lease


_LEASES = sa.select(LEASES).where(LEASES.c.lease.in_(sa.bindparam("ids", expanding=True)))


def _lease_rows(connection: Connection, leases: Collection[str]) -> dict[str, Row[Any]]:
    return {row.lease: row for row in connection.execute(_LEASES, {"ids": list(leases)})}


def _owned(rows: Mapping[str, Row[Any]], lease: str, node: str) -> Row[Any]:
    """A lease, for its owner. Raises NotFound or Forbidden."""
    row = rows.get(lease)
    if row is None:
        raise NotFound(f"there is no lease {lease}")
    if row.node != node:
        raise Forbidden(f"lease {lease} belongs to node {row.node}, not to {node}")
    return row


Asked = tuple[str, str]
"""A lease, and the node that asks for it."""


def leases_of(connection: Connection, asked: Sequence[Asked]) -> list[tuple[Row[Any], Lease] | Refusal]:
    """Leases and their documents, for their owners."""
    rows = _lease_rows(connection, {lease for lease, _ in asked})
    return [_document(rows, *one) for one in asked]


def _document(rows: Mapping[str, Row[Any]], lease: str, node: str) -> tuple[Row[Any], Lease] | Refusal:
    try:
        row = _owned(rows, lease, node)
    except Refusal as refusal:
        return refusal
    return row, msgspec.msgpack.decode(msgspec.msgpack.decode(row.document, type=Signed).payload, type=Lease)


def receipt_of(row: Row[Any], parcel: ValidSubmission, now: float) -> Signed | None:
    """The receipt if this very parcel was taken before, nothing if the lease waits for it. Raises LeaseGone.

    Asked before anything is stored, too: otherwise a closed lease could fill the store with blobs that no role wants.
    """
    if row.status == "submitted" and row.submission == parcel.digest:
        return msgspec.msgpack.decode(row.receipt, type=Signed)
    if row.status != "open":
        raise LeaseGone(f"lease {row.lease} is {row.status}, it was opened {now - row.opened_at:.0f} s ago")
    return None


def take(
    connection: Connection, run_ctx: RunContext, profiles: Profiles, deliveries: Sequence[StoredSubmission], now: float
) -> list[Signed | Refusal]:
    """Commit submissions whose bodies are stored already, and draw their audits: a receipt or a refusal for each.

    Those of one node are taken in one after the other, for its receipts are a chain.
    """
    rounds: dict[int, list[int]] = defaultdict(list)
    seen = Counter[str]()
    for place, delivery in enumerate(deliveries):
        rounds[seen[delivery.node]].append(place)
        seen[delivery.node] += 1
    answers: dict[int, Signed | Refusal] = {}
    for places in rounds.values():
        found = _take_apart(connection, run_ctx, profiles, [deliveries[place] for place in places], now)
        answers |= dict(zip(places, found, strict=True))
    return [answers[place] for place in range(len(deliveries))]


def _take_apart(
    connection: Connection, run_ctx: RunContext, profiles: Profiles, deliveries: Sequence[StoredSubmission], now: float
) -> list[Signed | Refusal]:
    """The same for submissions of different nodes."""
    leases = _lease_rows(connection, {delivery.lease for delivery in deliveries})
    senders = node_rows(connection, {delivery.node for delivery in deliveries})
    known: list[Signed | Refusal | None] = []
    for delivery in deliveries:
        try:
            known.append(_known(connection, run_ctx, profiles, leases, senders, delivery, now))
        except Refusal as refusal:
            known.append(refusal)
    left = [delivery for delivery, answer in zip(deliveries, known, strict=True) if answer is None]
    receipts = iter(_take_in(connection, run_ctx, _entries(connection, run_ctx, leases, senders, left, now), now))
    return [next(receipts) if answer is None else answer for answer in known]


def _known(
    connection: Connection,
    run_ctx: RunContext,
    profiles: Profiles,
    leases: Mapping[str, Row[Any]],
    senders: Mapping[str, Row[Any]],
    delivery: StoredSubmission,
    now: float,
) -> Signed | None:
    """The receipt of one that was taken before. Raises whatever speaks against taking it; wrong weights have
    consequences that stay."""
    sender = senders.get(delivery.node)
    if sender is None:
        raise unknown_node(delivery.node)
    leased, shown = delivery.parcel.lease, delivery.possession
    if wrong := possession.of_submission(connection, run_ctx, profiles, sender, leased, shown, now):
        raise WrongWeights(wrong)
    row = _owned(leases, delivery.lease, delivery.node)
    if (earlier := receipt_of(row, delivery.parcel, now)) is not None:
        return earlier
    if sender.status == "ejected":
        raise Ejected(f"node {delivery.node} was ejected for failing verification")
    return None


@dataclass(frozen=True)
class _Entry:
    """A submission that is taken in, with all that is derived from it."""

    delivery: StoredSubmission
    sender: Row[Any]
    opened_at: float
    order: Sequence[str]
    """Its rollouts that still wait for their tokens; a stale group's have been let go."""
    unsent: Sequence[str]
    receipt: Signed
    probability: float
    """Of an audit of each rollout."""
    held: Sequence[str]
    """Rollouts drawn for audit, on probation all of them. Evaluation by the operator's validators is not audited."""

    @property
    def digest(self) -> str:
        """The digest that names the submission."""
        return self.delivery.parcel.digest

    @property
    def tokens(self) -> int:
        """Of the rollouts that it is about."""
        return sum(self.delivery.parcel.tokens[rollout] for rollout in self.order)

    @property
    def is_audited(self) -> bool:
        """Whether it is of the kind that is audited."""
        return self.delivery.parcel.lease.purpose != "eval" and bool(self.order)


def _entries(
    connection: Connection,
    run_ctx: RunContext,
    leases: Mapping[str, Row[Any]],
    senders: Mapping[str, Row[Any]],
    deliveries: Sequence[StoredSubmission],
    now: float,
) -> list[_Entry]:
    waiting = _waiting(connection, [delivery.lease for delivery in deliveries])
    entries: list[_Entry] = []
    for delivery in deliveries:
        parcel, sender, left = delivery.parcel, senders[delivery.node], waiting[delivery.lease]
        order = [rollout for rollout in parcel.tokens if rollout in left]
        probability = budget.probability(connection, run_ctx, node_record.read(sender), now)
        entry = _Entry(
            delivery=delivery,
            sender=sender,
            opened_at=leases[delivery.lease].opened_at,
            order=order,
            unsent=[rollout for rollout in left if rollout not in parcel.tokens],
            receipt=_receipt(run_ctx, sender, parcel, order, now),
            probability=probability,
            held=(),
        )
        entries.append(replace(entry, held=_drawn(run_ctx, entry)))
    return entries


def _drawn(run_ctx: RunContext, entry: _Entry) -> list[str]:
    if not entry.is_audited:
        return []
    lease = entry.delivery.parcel.lease
    key, digest = seeds.audit_key(run_ctx.step_secret(lease.step)), bytes.fromhex(entry.digest)
    return [entry.order[i] for i in draw(key, lease.lease, digest, len(entry.order), entry.probability)]


def _take_in(connection: Connection, run_ctx: RunContext, entries: Sequence[_Entry], now: float) -> list[Signed]:
    """Write it all down: every statement is one for all of them."""
    if not entries:
        return []
    insert_rows(connection, SUBMISSIONS, [_submission_row(run_ctx, entry, now) for entry in entries])
    _go_on(connection, entries, now)
    open_audits(connection, run_ctx, [_audit(entry) for entry in entries if entry.held], "draw", now)
    update_rows(connection, NODES, [_sender_values(entry, now) for entry in entries])
    return [entry.receipt for entry in entries]


def _audit(entry: _Entry) -> Drawn:
    parcel, lease = entry.delivery.parcel, entry.delivery.parcel.lease
    tokens = sum(parcel.tokens[rollout] for rollout in entry.held)
    return Drawn(entry.digest, lease.lease, entry.delivery.node, entry.held, lease.step, tokens)


def _go_on(connection: Connection, entries: Sequence[_Entry], now: float) -> None:
    """Close the leases, hold what is drawn for audit, let the rest go on to the scorers and free what did not come."""
    shift_rows(connection, "rollout", [place for entry in entries for place in _places(entry)], "leased")
    shift(connection, "rollout", [one for entry in entries for one in entry.unsent], "leased", "expired")
    shift_rows(connection, "lease", [_lease_values(entry) for entry in entries], "open")
    for entry in entries:
        count = len(entry.order)
        told = partial(record, connection, at=now, submission=entry.digest)
        told("rollout", entry.held, "leased", "held")
        told("rollout", _free(entry), "leased", "received")
        told("rollout", entry.unsent, "leased", "expired", rollouts=count)
        told("lease", [entry.delivery.lease], "open", "submitted", rollouts=count)


def _free(entry: _Entry) -> list[str]:
    held = set(entry.held)
    return [rollout for rollout in entry.order if rollout not in held]


def _lease_values(entry: _Entry) -> dict[str, Any]:
    sealed = msgspec.msgpack.encode(entry.receipt)
    row = {"lease": entry.delivery.lease, "status": "submitted", "submission": entry.digest, "receipt": sealed}
    return row | {"is_partial": bool(entry.unsent)}


def give_back(connection: Connection, lease: str, node: str, now: float) -> int:
    """A draining node hands a lease back untouched; gives 0 if it was closed already."""
    row = _owned(_lease_rows(connection, [lease]), lease, node)
    if row.status != "open":
        return 0
    end_leases(connection, [lease], "returned", now, why="handed back", node=node)
    return 1


def _waiting(connection: Connection, leases: Sequence[str]) -> dict[str, set[str]]:
    """Rollouts of leases that still wait for their tokens."""
    waiting: dict[str, set[str]] = defaultdict(set)
    for lease, rollout in connection.execute(_WAITING, {"ids": list(leases)}):
        waiting[lease].add(rollout)
    return waiting


_WAITING = sa.select(ROLLOUTS.c.lease, ROLLOUTS.c.rollout).where(
    ROLLOUTS.c.lease.in_(sa.bindparam("ids", expanding=True)), ROLLOUTS.c.status == "leased"
)


def _receipt(
    run_ctx: RunContext, sender: Row[Any], parcel: ValidSubmission, order: Sequence[str], now: float
) -> Signed:
    receipt = Receipt(
        run=run_ctx.run,
        node=sender.node,
        before=sender.receipt,
        lease=parcel.lease.lease,
        submission=parcel.digest,
        rollouts=len(order),
        tokens=sum(parcel.tokens[rollout] for rollout in order),
        received_at=now,
    )
    return seal(run_ctx.receipts, RECEIPT, receipt)


def _submission_row(run_ctx: RunContext, entry: _Entry, now: float) -> dict[str, Any]:
    parcel = entry.delivery.parcel
    return {
        "submission": entry.digest,
        "run": run_ctx.run,
        "lease": entry.delivery.lease,
        "node": entry.delivery.node,
        "profile": entry.sender.profile,
        "received_at": now,
        "rollouts": len(entry.order),
        "tokens": sum(parcel.tokens.values()),
        "generate_s": parcel.generate_s,
        "logp_blob": entry.delivery.logp,
        "audit_probability": entry.probability,
    }


def _places(entry: _Entry) -> Iterator[dict[str, Any]]:
    """Where in the stored body each rollout is, and what is next. Nothing of a stale group is looked at again."""
    waiting, held = set(entry.order), set(entry.held)
    for place, (rollout, length) in enumerate(entry.delivery.parcel.tokens.items()):
        if rollout in waiting:
            row = {"rollout": rollout, "status": "held" if rollout in held else "received"}
            yield row | {"submission": entry.digest, "position": place, "tokens": length}


def _sender_values(entry: _Entry, now: float) -> dict[str, Any]:
    """Of the node: its record, last receipt, and tokens per second from lease to submission by our clock, smoothed."""
    sender, known = entry.sender, node_record.read(entry.sender)
    speed = sum(entry.delivery.parcel.tokens.values()) / max(now - entry.opened_at, 1e-3)
    return {
        "node": sender.node,
        "record": msgspec.msgpack.encode(submitted(known, entry.tokens) if entry.is_audited else known),
        "receipt": digest_of(entry.receipt.payload),
        "tokens_per_s": 0.7 * sender.tokens_per_s + 0.3 * speed if sender.tokens_per_s else speed,
    }
