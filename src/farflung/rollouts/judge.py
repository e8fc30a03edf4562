"""Coordinator: take signed evidence, fold it into the node's record, pronounce the verdict.

Evidence is kept as it comes but folded per node in the order of submission: the test is valid for orders that are
fixed before the evidence is known, and for no others.
"""

import logging
from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.protocol import wire
from farflung.protocol.errors import Malformed, NotFound
from farflung.protocol.identity import Signed, seal, unseal
from farflung.protocol.messages import Evidence, Lease, RolloutEvidence, Verdict
from farflung.rollouts import consequences, standing
from farflung.rollouts.audit import open_audit
from farflung.store.book import Book, node_row
from farflung.store.db import move
from farflung.store.tables import AUDITS, LEASES, ROLLOUTS, SUBMISSIONS, VERDICTS
from farflung.trust import fingerprint
from farflung.trust.evidence import Profile, Profiles, Seen, flips, is_bad, log_ratios
from farflung.trust.record import Finding, NodeRecord, Outcome, confirm, fold, weigh

log = logging.getLogger(__name__)
KIND = "evidence"


# --- evidence --------------------------------------------------------------------------------------------------------


def take_evidence(
    connection: Connection, book: Book, profiles: Profiles, validator: str, signed: Signed, now: float
) -> int:
    """Keep one audit's evidence and fold what can be folded of that node. Gives 0 if it was there already."""
    evidence = unseal(signed, KIND, Evidence)
    audit = connection.execute(sa.select(AUDITS).where(AUDITS.c.audit == evidence.audit)).first()
    if audit is None or audit.run != book.run:
        raise NotFound(f"run {book.run!r} has no audit {evidence.audit}")
    if audit.status != "claimed" or audit.claimed_by != validator:
        return 0
    _check(connection, book, audit, evidence, profiles.run)
    connection.execute(
        AUDITS.update().where(AUDITS.c.audit == audit.audit).values(evidence=msgspec.msgpack.encode(signed))
    )
    move(connection, "audit", [audit.audit], "claimed", "done", now, validator=validator)
    _fold_in_order(connection, book, profiles, audit.node, now)
    return 1


def _check(connection: Connection, book: Book, audit: Row[Any], evidence: Evidence, profile: Profile) -> None:
    """Evidence must be about exactly the drawn rollouts, every token of them, under the leased weights and profile."""
    drawn = msgspec.json.decode(audit.rollouts, type=list[str])
    found = [finding.rollout for finding in evidence.rollouts]
    if sorted(found) != sorted(drawn):
        raise Malformed(f"audit {audit.audit} drew {drawn}; the evidence is about {found}")
    if evidence.manifest != book.manifest_of(connection, audit.step) or evidence.profile != profile.name:
        raise Malformed(f"audit {audit.audit} is of other weights or another profile than {profile.name!r}")
    query = sa.select(ROLLOUTS.c.rollout, ROLLOUTS.c.tokens).where(ROLLOUTS.c.rollout.in_(drawn))
    tokens: dict[str, int] = {row.rollout: row.tokens for row in connection.execute(query)}
    asks = _asks_fingerprints(connection, audit)
    for found in evidence.rollouts:
        if asks != (found.distance is not None):
            raise Malformed(
                f"audit {audit.audit} {'asks for' if asks else 'is without'} fingerprints; rollout {found.rollout} has "
                f"{'no distance' if asks else 'a distance'}"
            )
        if len(finding(profile, found).log_ratios) and len(_seen(found).gap) != tokens[found.rollout]:
            raise Malformed(f"rollout {found.rollout} has {tokens[found.rollout]} tokens, its evidence another number")


def _asks_fingerprints(connection: Connection, audit: Row[Any]) -> bool:
    sealed = connection.execute(sa.select(LEASES.c.document).where(LEASES.c.lease == audit.lease)).scalar_one()
    return unseal(msgspec.msgpack.decode(sealed, type=Signed), "lease", Lease).fingerprint


def _fold_in_order(connection: Connection, book: Book, profiles: Profiles, node: str, now: float) -> None:
    """Fold this node's answered audits, oldest submission first, up to the first that is still unanswered."""
    rows = connection.execute(
        sa.select(AUDITS, SUBMISSIONS.c.profile)
        .join(SUBMISSIONS, SUBMISSIONS.c.submission == AUDITS.c.submission)
        .where(AUDITS.c.node == node, AUDITS.c.outcome.is_(None), AUDITS.c.status != "cancelled")
        .order_by(AUDITS.c.kind != "confirm", AUDITS.c.kind != "suspicion", SUBMISSIONS.c.received_at, AUDITS.c.audit)
    ).all()
    for row in rows:
        if row.status == "done":
            _judge(connection, book, profiles.of(row.profile), row, now)
        elif row.kind != "suspicion":
            return


FOLDS = {"draw": fold, "suspicion": weigh, "confirm": confirm}
"""How the findings of each kind of audit change a record."""


def _judge(connection: Connection, book: Book, profile: Profile, audit: Row[Any], now: float) -> None:
    findings = _findings(profile, audit)
    node = node_row(connection, audit.node)
    before = standing.read(node)
    if before.status == "quarantined" and audit.kind == "draw":
        return  # it waits for the second opinion
    after, outcome = FOLDS[audit.kind](before, findings, standing.settings(book))
    after, outcome = fingerprint.judge(after, outcome, findings, profile.fingerprint)
    connection.execute(AUDITS.update().where(AUDITS.c.audit == audit.audit).values(outcome=outcome.kind))
    standing.write(connection, audit.node, after)
    if after.status != before.status:
        move(connection, "node", [audit.node], before.status, after.status, now, why=outcome.reason)
    _take_effect(connection, book, audit, findings, outcome, now)
    if outcome.kind != "ok":
        _pronounce(connection, book, audit, after, outcome, now)


def _findings(profile: Profile, audit: Row[Any]) -> list[Finding]:
    """The findings of an answered audit, in the order in which its rollouts were drawn."""
    evidence = unseal(msgspec.msgpack.decode(audit.evidence, type=Signed), KIND, Evidence)
    order = {rollout: i for i, rollout in enumerate(msgspec.json.decode(audit.rollouts, type=list[str]))}
    return [finding(profile, found) for found in sorted(evidence.rollouts, key=lambda found: order[found.rollout])]


def _take_effect(
    connection: Connection, book: Book, audit: Row[Any], findings: Sequence[Finding], outcome: Outcome, now: float
) -> None:
    match outcome.kind:
        case "ok" | "release":
            consequences.clear(connection, audit, now)
        case "void":
            bad = [f.rollout for f in findings if f.is_far or is_bad(f.log_lr, book.config.trust.cap)]
            consequences.void(connection, book, audit, bad, now)
            consequences.hold(connection, book, ROLLOUTS.c.node == audit.node, f"audit {audit.audit} failed", now)
        case "quarantine":
            submission = sa.select(SUBMISSIONS).where(SUBMISSIONS.c.submission == audit.submission)
            rollouts = msgspec.json.decode(audit.rollouts, type=list[str])
            open_audit(connection, book, connection.execute(submission).one(), rollouts, "confirm", now)
            consequences.hold(connection, book, ROLLOUTS.c.node == audit.node, "its node is in quarantine", now)
        case "eject":
            bad = [found.rollout for found in findings if is_bad(found.log_lr, book.config.trust.cap)]
            consequences.void(connection, book, audit, bad, now)
            consequences.eject(connection, book, audit.node, now)


def finding(profile: Profile, found: RolloutEvidence) -> Finding:
    """What one rollout's evidence comes to under a profile. Raises Malformed for numbers that no replay gives."""
    seen = _seen(found)
    try:
        ratios = log_ratios(profile, seen)
    except ValueError as error:
        raise Malformed(f"evidence on rollout {found.rollout}: {error}") from error
    far = found.distance is not None and fingerprint.is_far(found.distance, profile.fingerprint)
    return Finding(found.rollout, len(seen.gap), flips(seen), tuple(ratios.tolist()), found.distance or 0.0, far)


def _seen(found: RolloutEvidence) -> Seen:
    return Seen(wire.unpack_floats(found.gap), wire.unpack_floats(found.margin), wire.unpack_floats(found.pick))


def _pronounce(
    connection: Connection, book: Book, audit: Row[Any], record: NodeRecord, outcome: Outcome, now: float
) -> None:
    verdict = Verdict(
        run=book.run,
        node=audit.node,
        audit=audit.audit,
        outcome=outcome.kind,
        statistic=outcome.statistic,
        threshold=outcome.threshold,
        reason=outcome.reason[:500],
        decided_at=now,
    )
    connection.execute(
        VERDICTS.insert().values(
            run=book.run,
            node=audit.node,
            outcome=verdict.outcome,
            submissions=record.submissions,
            document=msgspec.msgpack.encode(seal(book.key, "verdict", verdict)),
        )
    )
    log.info("verdict node=%s outcome=%s reason=%s", audit.node, verdict.outcome, verdict.reason)
