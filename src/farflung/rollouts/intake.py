"""Coordinator: take submissions in. Sanity first (no torch, no database), then one transaction with the audit draw.

A submission is named by the digest of lease, node and tokens. The first one committed for a lease is final; the same
one sent again gets the same receipt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.protocol import seeds, wire
from farflung.protocol.errors import Ejected, Forbidden, LeaseGone, Malformed, NotFound, Rejected
from farflung.protocol.fingerprint import unpack
from farflung.protocol.identity import Signed, seal
from farflung.protocol.messages import Lease, Receipt, Submission, SubmissionBody, SubmittedRollout
from farflung.rollouts import budget, standing
from farflung.rollouts.audit import open_audit
from farflung.store.blobs import digest_of
from farflung.store.book import Book, node_row
from farflung.store.db import end_leases, move
from farflung.store.tables import LEASES, NODES, ROLLOUTS, SUBMISSIONS
from farflung.trust.policy import draw
from farflung.trust.record import submitted

RECEIPT = "receipt"


@dataclass(frozen=True)
class Parcel:
    """A submission that passed sanity: its body as stored, and what the database needs of it."""

    lease: Lease
    body: bytes
    digest: str
    tokens: dict[str, int]
    """Rollout → number of tokens."""
    is_partial: bool
    generate_s: float
    logp: bytes
    """The node's own log-probabilities, a metric; empty when it sent none."""


_LEASE = sa.select(LEASES).where(LEASES.c.lease == sa.bindparam("id"))


def lease_of(connection: Connection, lease: str, node: str) -> tuple[Row[Any], Lease]:
    """A lease and its document, for its owner. Raises NotFound or Forbidden."""
    row = connection.execute(_LEASE, {"id": lease}).first()
    if row is None:
        raise NotFound(f"there is no lease {lease}")
    if row.node != node:
        raise Forbidden(f"lease {lease} belongs to node {row.node}, not to {node}")
    return row, msgspec.msgpack.decode(msgspec.msgpack.decode(row.document, type=Signed).payload, type=Lease)


def receipt_of(row: Row[Any], parcel: Parcel, now: float) -> Signed | None:
    """The receipt if this very parcel was taken before, nothing if the lease waits for it. Raises LeaseGone.

    Asked before anything is stored, too: otherwise a closed lease could fill the store with blobs that nobody wants.
    """
    if row.status == "submitted" and row.submission == parcel.digest:
        return msgspec.msgpack.decode(row.receipt, type=Signed)
    if row.status != "open":
        raise LeaseGone(f"lease {row.lease} is {row.status}, it was opened {now - row.opened_at:.0f} s ago")
    return None


def inspect(lease: Lease, node: str, submission: Submission, vocab: int, eos_ids: frozenset[int]) -> Parcel:
    """Sanity, a pure function. Raises Rejected with the first fault."""
    assigned = {sample.rollout for group in lease.groups for sample in group.samples}
    named = [rollout.rollout for rollout in submission.rollouts]
    if not set(named) <= assigned:
        raise Rejected(f"lease {lease.lease} does not assign rollouts {sorted(set(named) - assigned)}")
    if len(set(named)) != len(named):
        raise Rejected(f"{len(named)} rollouts came under {len(set(named))} ids; send each once")
    if not submission.partial and len(named) != len(assigned):
        raise Rejected(f"lease {lease.lease} assigns {len(assigned)} rollouts, {len(named)} came; send all of them")
    tokens = {r.rollout: _length(r, lease.budget, vocab, eos_ids) for r in submission.rollouts}
    for rollout in submission.rollouts:
        _check_fingerprint(rollout, lease)
    body = msgspec.msgpack.encode(SubmissionBody(lease=lease.lease, node=node, rollouts=list(submission.rollouts)))
    return Parcel(
        lease=lease,
        body=body,
        digest=digest_of(body),
        tokens=tokens,
        is_partial=submission.partial,
        generate_s=submission.generate_s,
        logp=_logp(submission, tokens),
    )


def _length(rollout: SubmittedRollout, budget: int, vocab: int, eos_ids: frozenset[int]) -> int:
    """Number of tokens of one rollout that ends as a rollout must."""
    ids = wire.unpack_ids(rollout.ids)
    if not 1 <= len(ids) <= budget:
        raise Rejected(f"rollout {rollout.rollout} has {len(ids)} tokens; the lease allows 1 to {budget}")
    if int(ids.max()) >= vocab:
        raise Rejected(f"rollout {rollout.rollout} has token {int(ids.max())}; the vocabulary has {vocab}")
    ends = np.isin(ids, list(eos_ids))
    if ends[:-1].any():
        raise Rejected(f"rollout {rollout.rollout} goes on after an end token at position {int(ends.argmax())}")
    if not ends[-1] and len(ids) < budget:
        raise Rejected(f"rollout {rollout.rollout} stops after {len(ids)} of {budget} tokens without an end token")
    return len(ids)


def _check_fingerprint(rollout: SubmittedRollout, lease: Lease) -> None:
    """A missing fingerprint must not pass for a good one, nor one that nobody will look at be stored."""
    if not lease.fingerprint and rollout.fingerprint:
        raise Rejected(f"rollout {rollout.rollout} has a fingerprint; lease {lease.lease} asks for none")
    if lease.fingerprint:
        try:
            unpack(rollout.fingerprint)
        except Malformed as error:
            raise Rejected(f"rollout {rollout.rollout}: {error}; lease {lease.lease} asks for one") from error


def _logp(submission: Submission, tokens: dict[str, int]) -> bytes:
    if not submission.logp:
        return b""
    if len(submission.logp) != len(submission.rollouts):
        raise Rejected(f"{len(submission.logp)} lists of log-probabilities for {len(submission.rollouts)} rollouts")
    for rollout, values in zip(submission.rollouts, submission.logp, strict=True):
        if len(wire.unpack_floats(values)) != tokens[rollout.rollout]:
            raise Rejected(f"rollout {rollout.rollout} has another number of log-probabilities than tokens")
    return msgspec.msgpack.encode(submission.logp)


# --- the transaction -------------------------------------------------------------------------------------------------


def take(connection: Connection, book: Book, node: str, parcel: Parcel, logp_blob: str | None, now: float) -> Signed:
    """Commit a submission whose body is stored already, and draw its audit. Raises LeaseGone or Ejected."""
    row, _ = lease_of(connection, parcel.lease.lease, node)
    if (earlier := receipt_of(row, parcel, now)) is not None:
        return earlier
    sender = node_row(connection, node)
    if sender.status == "ejected":
        raise Ejected(f"node {node} was ejected for failing verification")
    leased = _leased(connection, row.lease)
    order = [rollout for rollout in parcel.tokens if rollout in leased]
    receipt = _receipt(book, sender, parcel, order, now)
    sealed = msgspec.msgpack.encode(receipt)
    connection.execute(_SUBMITTED, {"id": row.lease, "digest": parcel.digest, "sealed": sealed})
    submission = _store(connection, book, sender, parcel, logp_blob, order, now)
    _set_places(connection, parcel, order)
    _draw(connection, book, sender, submission, parcel, order, now)
    end_leases(connection, [row.lease], "submitted", now, submission=parcel.digest, rollouts=len(order))
    _remember(connection, sender, parcel, receipt, now - row.opened_at)
    return receipt


_SUBMITTED = (
    LEASES.update()
    .where(LEASES.c.lease == sa.bindparam("id"))
    .values(submission=sa.bindparam("digest"), receipt=sa.bindparam("sealed"))
)


def give_back(connection: Connection, lease: str, node: str, now: float) -> int:
    """A draining node hands a lease back untouched; gives 0 if it was closed already."""
    row, _ = lease_of(connection, lease, node)
    if row.status != "open":
        return 0
    end_leases(connection, [lease], "returned", now, why="handed back", node=node)
    return 1


def _leased(connection: Connection, lease: str) -> set[str]:
    """Rollouts of a lease that still wait for their tokens; a stale group's have been let go."""
    return set(connection.execute(_WAITING, {"id": lease}).scalars())


_WAITING = sa.select(ROLLOUTS.c.rollout).where(ROLLOUTS.c.lease == sa.bindparam("id"), ROLLOUTS.c.status == "leased")


def _receipt(book: Book, sender: Row[Any], parcel: Parcel, order: Sequence[str], now: float) -> Signed:
    receipt = Receipt(
        run=book.run,
        node=sender.node,
        before=sender.receipt,
        lease=parcel.lease.lease,
        submission=parcel.digest,
        rollouts=len(order),
        tokens=sum(parcel.tokens[rollout] for rollout in order),
        received_at=now,
    )
    return seal(book.receipts, RECEIPT, receipt)


def _store(
    connection: Connection,
    book: Book,
    sender: Row[Any],
    parcel: Parcel,
    logp: str | None,
    order: Sequence[str],
    now: float,
) -> SimpleNamespace:
    row = {
        "submission": parcel.digest,
        "run": book.run,
        "lease": parcel.lease.lease,
        "node": sender.node,
        "profile": sender.profile,
        "received_at": now,
        "rollouts": len(order),
        "tokens": sum(parcel.tokens.values()),
        "generate_s": parcel.generate_s,
        "logp_blob": logp,
        "audit_probability": budget.probability(connection, book, standing.read(sender)),
    }
    connection.execute(SUBMISSIONS.insert(), row)
    return SimpleNamespace(**row)


def _set_places(connection: Connection, parcel: Parcel, order: Sequence[str]) -> None:
    """Where in the stored body each rollout is. Nothing of a stale group is looked at again."""
    place = {rollout: number for number, rollout in enumerate(parcel.tokens)}
    if not order:
        return
    connection.execute(
        _PLACED,
        [
            {"id": rollout, "digest": parcel.digest, "place": place[rollout], "length": parcel.tokens[rollout]}
            for rollout in order
        ],
    )


_PLACED = (
    ROLLOUTS.update()
    .where(ROLLOUTS.c.rollout == sa.bindparam("id"))
    .values(submission=sa.bindparam("digest"), position=sa.bindparam("place"), tokens=sa.bindparam("length"))
)


def _draw(
    connection: Connection,
    book: Book,
    sender: Row[Any],
    submission: Any,
    parcel: Parcel,
    order: Sequence[str],
    now: float,
) -> None:
    """Hold what is drawn for audit, on probation all of it; the rest goes on to the scorers.

    Evaluation by the operator's own validators is not audited.
    """
    held: list[str] = []
    if parcel.lease.purpose != "eval" and order:
        node = submitted(standing.read(sender))
        standing.write(connection, sender.node, node)
        key = seeds.audit_key(book.step_secret(parcel.lease.step))
        limit = submission.audit_probability
        drawn = draw(key, parcel.lease.lease, bytes.fromhex(parcel.digest), len(order), limit)
        if drawn:
            held = [order[i] for i in drawn]
            open_audit(connection, book, submission, held, "draw", now)
    free = [rollout for rollout in order if rollout not in set(held)]
    move(connection, "rollout", held, "leased", "held", now, submission=parcel.digest)
    move(connection, "rollout", free, "leased", "received", now, submission=parcel.digest)


def _remember(connection: Connection, sender: Row[Any], parcel: Parcel, receipt: Signed, took_s: float) -> None:
    """Of the node: its last receipt, and tokens per second from lease to submission by our clock, smoothed."""
    speed = sum(parcel.tokens.values()) / max(took_s, 1e-3)
    smoothed = 0.7 * sender.tokens_per_s + 0.3 * speed if sender.tokens_per_s else speed
    values = {"id": sender.node, "last": digest_of(receipt.payload), "speed": smoothed}
    connection.execute(_REMEMBERED, values)


_REMEMBERED = (
    NODES.update()
    .where(NODES.c.node == sa.bindparam("id"))
    .values(receipt=sa.bindparam("last"), tokens_per_s=sa.bindparam("speed"))
)
