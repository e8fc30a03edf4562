"""Coordinator: take submissions in, one transaction for many, with the audit draw.

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
    """A submission whose body is stored, on its way into the database."""

    node: str
    valid: ValidSubmission
    possession: str
    logp: str | None
    """Digest of the stored log-probabilities."""

    @property
    def lease(self) -> str:
        """Id of the lease that it is for."""
        return self.valid.lease.lease


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


def receipt_of(row: Row[Any], valid: ValidSubmission, now: float) -> Signed | None:
    """The receipt if this very submission was taken before, nothing if the lease waits for it. Raises LeaseGone.

    Asked before anything is stored, too: otherwise a closed lease could fill the store with blobs that no role wants.
    """
    if row.status == "submitted" and row.submission == valid.digest:
        return msgspec.msgpack.decode(row.receipt, type=Signed)
    if row.status != "open":
        raise LeaseGone(f"lease {row.lease} is {row.status}, it was opened {now - row.opened_at:.0f} s ago")
    return None


def take(
    connection: Connection, run_ctx: RunContext, profiles: Profiles, stored_ones: Sequence[StoredSubmission], now: float
) -> list[Signed | Refusal]:
    """Commit submissions whose bodies are stored already, and draw their audits: a receipt or a refusal for each.

    Those of one node are taken in one after the other, for its receipts are a chain.
    """
    rounds: dict[int, list[int]] = defaultdict(list)
    seen = Counter[str]()
    for place, stored in enumerate(stored_ones):
        rounds[seen[stored.node]].append(place)
        seen[stored.node] += 1
    answers: dict[int, Signed | Refusal] = {}
    for places in rounds.values():
        found = _take_apart(connection, run_ctx, profiles, [stored_ones[place] for place in places], now)
        answers |= dict(zip(places, found, strict=True))
    return [answers[place] for place in range(len(stored_ones))]


def _take_apart(
    connection: Connection, run_ctx: RunContext, profiles: Profiles, stored_ones: Sequence[StoredSubmission], now: float
) -> list[Signed | Refusal]:
    """The same for submissions of different nodes."""
    leases = _lease_rows(connection, {stored.lease for stored in stored_ones})
    senders = node_rows(connection, {stored.node for stored in stored_ones})
    known: list[Signed | Refusal | None] = []
    for stored in stored_ones:
        try:
            known.append(_known(connection, run_ctx, profiles, leases, senders, stored, now))
        except Refusal as refusal:
            known.append(refusal)
    left = [stored for stored, answer in zip(stored_ones, known, strict=True) if answer is None]
    receipts = iter(_take_in(connection, run_ctx, _entries(connection, run_ctx, leases, senders, left, now), now))
    return [next(receipts) if answer is None else answer for answer in known]


def _known(
    connection: Connection,
    run_ctx: RunContext,
    profiles: Profiles,
    leases: Mapping[str, Row[Any]],
    senders: Mapping[str, Row[Any]],
    stored: StoredSubmission,
    now: float,
) -> Signed | None:
    """The receipt of one that was taken before. Raises whatever speaks against taking it; what follows from
    wrong weights stays."""
    sender = senders.get(stored.node)
    if sender is None:
        raise unknown_node(stored.node)
    leased, shown = stored.valid.lease, stored.possession
    if wrong := possession.of_submission(connection, run_ctx, profiles, sender, leased, shown, now):
        raise WrongWeights(wrong)
    row = _owned(leases, stored.lease, stored.node)
    if (earlier := receipt_of(row, stored.valid, now)) is not None:
        return earlier
    if sender.status == "ejected":
        raise Ejected(f"node {stored.node} was ejected for failing verification")
    return None


@dataclass(frozen=True)
class AcceptedSubmission:
    """A submission that is taken in, with all that is derived from it."""

    stored: StoredSubmission
    sender: Row[Any]
    opened_at: float
    rollouts: Sequence[str]
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
        return self.stored.valid.digest

    @property
    def tokens(self) -> int:
        """Of the rollouts that it is about."""
        return sum(self.stored.valid.tokens[rollout] for rollout in self.rollouts)

    @property
    def is_audited(self) -> bool:
        """Whether it is of the kind that is audited."""
        return self.stored.valid.lease.purpose != "eval" and bool(self.rollouts)


def _entries(
    connection: Connection,
    run_ctx: RunContext,
    leases: Mapping[str, Row[Any]],
    senders: Mapping[str, Row[Any]],
    stored_ones: Sequence[StoredSubmission],
    now: float,
) -> list[AcceptedSubmission]:
    waiting = _waiting(connection, [stored.lease for stored in stored_ones])
    accepted_ones: list[AcceptedSubmission] = []
    for stored in stored_ones:
        valid, sender, left = stored.valid, senders[stored.node], waiting[stored.lease]
        rollouts = [rollout for rollout in valid.tokens if rollout in left]
        probability = budget.probability(connection, run_ctx, node_record.read(sender), sender.profile, now)
        accepted = AcceptedSubmission(
            stored=stored,
            sender=sender,
            opened_at=leases[stored.lease].opened_at,
            rollouts=rollouts,
            unsent=[rollout for rollout in left if rollout not in valid.tokens],
            receipt=_receipt(run_ctx, sender, valid, rollouts, now),
            probability=probability,
            held=(),
        )
        accepted_ones.append(replace(accepted, held=_drawn(run_ctx, accepted)))
    return accepted_ones


def _drawn(run_ctx: RunContext, accepted: AcceptedSubmission) -> list[str]:
    if not accepted.is_audited:
        return []
    lease = accepted.stored.valid.lease
    key, digest = seeds.audit_key(run_ctx.step_secret(lease.step)), bytes.fromhex(accepted.digest)
    return [accepted.rollouts[i] for i in draw(key, lease.lease, digest, len(accepted.rollouts), accepted.probability)]


def _take_in(
    connection: Connection, run_ctx: RunContext, accepted_ones: Sequence[AcceptedSubmission], now: float
) -> list[Signed]:
    """Write it all down: every statement is one for all of them."""
    if not accepted_ones:
        return []
    insert_rows(connection, SUBMISSIONS, [_submission_row(run_ctx, accepted, now) for accepted in accepted_ones])
    _go_on(connection, accepted_ones, now)
    open_audits(connection, run_ctx, [_audit(accepted) for accepted in accepted_ones if accepted.held], "draw", now)
    update_rows(connection, NODES, [_sender_values(accepted, now) for accepted in accepted_ones])
    return [accepted.receipt for accepted in accepted_ones]


def _audit(accepted: AcceptedSubmission) -> Drawn:
    valid, lease = accepted.stored.valid, accepted.stored.valid.lease
    tokens = sum(valid.tokens[rollout] for rollout in accepted.held)
    return Drawn(accepted.digest, lease.lease, accepted.stored.node, accepted.held, lease.step, tokens)


def _go_on(connection: Connection, accepted_ones: Sequence[AcceptedSubmission], now: float) -> None:
    """Close the leases, hold what is drawn for audit, let the rest go on to the scorers and free what did not come."""
    shift_rows(connection, "rollout", [place for accepted in accepted_ones for place in _places(accepted)], "leased")
    shift(connection, "rollout", [one for accepted in accepted_ones for one in accepted.unsent], "leased", "expired")
    shift_rows(connection, "lease", [_lease_values(accepted) for accepted in accepted_ones], "open")
    for accepted in accepted_ones:
        count = len(accepted.rollouts)
        note = partial(record, connection, at=now, submission=accepted.digest)
        note("rollout", accepted.held, "leased", "held")
        note("rollout", _free(accepted), "leased", "received")
        note("rollout", accepted.unsent, "leased", "expired", rollouts=count)
        note("lease", [accepted.stored.lease], "open", "submitted", rollouts=count)


def _free(accepted: AcceptedSubmission) -> list[str]:
    held = set(accepted.held)
    return [rollout for rollout in accepted.rollouts if rollout not in held]


def _lease_values(accepted: AcceptedSubmission) -> dict[str, Any]:
    sealed = msgspec.msgpack.encode(accepted.receipt)
    row = {"lease": accepted.stored.lease, "status": "submitted", "submission": accepted.digest, "receipt": sealed}
    return row | {"is_partial": bool(accepted.unsent)}


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
    run_ctx: RunContext, sender: Row[Any], valid: ValidSubmission, rollouts: Sequence[str], now: float
) -> Signed:
    receipt = Receipt(
        run=run_ctx.run,
        node=sender.node,
        before=sender.receipt,
        lease=valid.lease.lease,
        submission=valid.digest,
        rollouts=len(rollouts),
        tokens=sum(valid.tokens[rollout] for rollout in rollouts),
        received_at=now,
    )
    return seal(run_ctx.receipts, RECEIPT, receipt)


def _submission_row(run_ctx: RunContext, accepted: AcceptedSubmission, now: float) -> dict[str, Any]:
    valid = accepted.stored.valid
    return {
        "submission": accepted.digest,
        "run": run_ctx.run,
        "lease": accepted.stored.lease,
        "node": accepted.stored.node,
        "profile": accepted.sender.profile,
        "received_at": now,
        "rollouts": len(accepted.rollouts),
        "tokens": sum(valid.tokens.values()),
        "generate_s": valid.generate_s,
        "logp_blob": accepted.stored.logp,
        "audit_probability": accepted.probability,
    }


def _places(accepted: AcceptedSubmission) -> Iterator[dict[str, Any]]:
    """Where in the stored body each rollout is, and what is next. Nothing of a stale group is looked at again."""
    waiting, held = set(accepted.rollouts), set(accepted.held)
    for place, (rollout, length) in enumerate(accepted.stored.valid.tokens.items()):
        if rollout in waiting:
            row = {"rollout": rollout, "status": "held" if rollout in held else "received"}
            yield row | {"submission": accepted.digest, "position": place, "tokens": length}


def _sender_values(accepted: AcceptedSubmission, now: float) -> dict[str, Any]:
    """Of the node: its record, last receipt, and tokens per second from lease to submission by our clock, smoothed."""
    sender, known = accepted.sender, node_record.read(accepted.sender)
    speed = sum(accepted.stored.valid.tokens.values()) / max(now - accepted.opened_at, 1e-3)
    return {
        "node": sender.node,
        "record": msgspec.msgpack.encode(submitted(known, accepted.tokens) if accepted.is_audited else known),
        "receipt": digest_of(accepted.receipt.payload),
        "tokens_per_s": 0.7 * sender.tokens_per_s + 0.3 * speed if sender.tokens_per_s else speed,
    }
