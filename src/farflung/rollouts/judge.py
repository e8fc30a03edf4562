"""Coordinator: hand out audits, take signed evidence, fold it into the node's record, and let the verdict have effect.

Evidence is kept as it comes but folded per node in the order of submission: the test is valid for orders that are
fixed before the evidence is known, and for no others.
"""

import logging
from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.protocol import seeds, wire
from farflung.protocol.errors import Malformed, NotFound
from farflung.protocol.identity import Signed, seal, unseal
from farflung.protocol.messages import AuditJob, AuditRollout, Evidence, Lease, RolloutEvidence, SubmissionBody, Verdict
from farflung.rollouts import standing
from farflung.store import ledger
from farflung.store.book import Book, node_row
from farflung.store.db import end_leases, move
from farflung.store.tables import AUDITS, GROUPS, LEASES, ROLLOUTS, SUBMISSIONS, TASKS, VERDICTS
from farflung.trust.evidence import Profile, average_log_ratio, is_bad_rollout, tally
from farflung.trust.record import Finding, NodeRecord, Outcome, fold

log = logging.getLogger(__name__)
KIND = "evidence"


def claim_audits(connection: Connection, book: Book, validator: str, limit: int, now: float) -> Sequence[Row[Any]]:
    """Open audits of one step, now this validator's for a while: that of the longest waiting, and others of its step.

    One that was claimed before and never answered waits from the end of that claim, so that an audit on which
    validators break does not keep them from all others.
    """
    _release(connection, book, now, AUDITS.c.claimed_until < now, why="the validator's claim lapsed")
    _release(connection, book, now, AUDITS.c.claimed_by == validator, why="the validator asks again")
    is_open = sa.and_(AUDITS.c.run == book.run, AUDITS.c.status == "open")
    since = sa.case((AUDITS.c.claimed_until > AUDITS.c.opened_at, AUDITS.c.claimed_until), else_=AUDITS.c.opened_at)
    first = sa.select(AUDITS.c.step).where(is_open).order_by(since, AUDITS.c.step).limit(1)
    rows = connection.execute(
        sa.select(AUDITS)
        .where(is_open, AUDITS.c.step == first.scalar_subquery())
        .order_by(since)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    ids = [row.audit for row in rows]
    move(connection, "audit", ids, "open", "claimed", now, validator=validator)
    connection.execute(
        AUDITS.update()
        .where(AUDITS.c.audit.in_(ids))
        .values(claimed_by=validator, claimed_until=now + book.config.coordinator.claim_s)
    )
    return rows


def _release(connection: Connection, book: Book, now: float, which: Any, why: str) -> None:
    query = sa.select(AUDITS.c.audit).where(AUDITS.c.run == book.run, AUDITS.c.status == "claimed", which)
    move(connection, "audit", list(connection.execute(query).scalars()), "claimed", "open", now, why=why)


def renew(connection: Connection, book: Book, node: str, now: float) -> None:
    """A validator or scorer that is alive keeps what it claimed: slow ones would take it from each other for ever."""
    for table, status in ((AUDITS, "claimed"), (ROLLOUTS, "received")):
        mine = sa.and_(table.c.run == book.run, table.c.status == status, table.c.claimed_by == node)
        until = now + book.config.coordinator.claim_s
        connection.execute(table.update().where(mine, table.c.claimed_until > 0).values(claimed_until=until))


def job(connection: Connection, book: Book, audit: Row[Any], body: SubmissionBody) -> AuditJob:
    """One audit as a validator gets it: prompt, seed and budget are the coordinator's, only tokens the node's."""
    tokens = {rollout.rollout: rollout.ids for rollout in body.rollouts}
    drawn = msgspec.json.decode(audit.rollouts, type=list[str])
    secret = book.step_secret(audit.step)
    sealed = connection.execute(sa.select(LEASES.c.document).where(LEASES.c.lease == audit.lease)).scalar_one()
    lease = unseal(msgspec.msgpack.decode(sealed, type=Signed), "lease", Lease)
    rows = connection.execute(
        sa.select(ROLLOUTS.c.rollout, ROLLOUTS.c.sample, TASKS.c.task, TASKS.c.prompt_ids)
        .join(GROUPS, GROUPS.c.group == ROLLOUTS.c.group)
        .join(TASKS, TASKS.c.task == GROUPS.c.task)
        .where(ROLLOUTS.c.rollout.in_(drawn))
        .order_by(ROLLOUTS.c.position)
    )
    return AuditJob(
        audit=audit.audit,
        step=audit.step,
        manifest=book.manifest_of(connection, audit.step),
        temperature=lease.temperature,  # as it was leased: a resumed run may have other settings
        budget=lease.budget,
        rollouts=[
            AuditRollout(
                rollout=row.rollout,
                prompt_ids=row.prompt_ids,
                seed=seeds.sample_seed(secret, row.task, row.sample),
                ids=tokens[row.rollout],
            )
            for row in rows
        ],
    )


# --- evidence --------------------------------------------------------------------------------------------------------


def take_evidence(
    connection: Connection, book: Book, profile: Profile, validator: str, signed: Signed, now: float
) -> int:
    """Keep one audit's evidence and fold what can be folded of that node. Gives 0 if it was there already."""
    evidence = unseal(signed, KIND, Evidence)
    audit = connection.execute(sa.select(AUDITS).where(AUDITS.c.audit == evidence.audit)).first()
    if audit is None or audit.run != book.run:
        raise NotFound(f"run {book.run!r} has no audit {evidence.audit}")
    if audit.status != "claimed" or audit.claimed_by != validator:
        return 0
    _check(connection, book, audit, evidence, profile)
    connection.execute(
        AUDITS.update().where(AUDITS.c.audit == audit.audit).values(evidence=msgspec.msgpack.encode(signed))
    )
    move(connection, "audit", [audit.audit], "claimed", "done", now, validator=validator)
    _fold_in_order(connection, book, profile, audit.node, now)
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
    for finding in evidence.rollouts:
        gap, margin = wire.unpack_floats(finding.gap), wire.unpack_floats(finding.margin)
        if len(gap) != tokens[finding.rollout] or len(margin) != len(gap):
            raise Malformed(f"rollout {finding.rollout} has {tokens[finding.rollout]} tokens, its evidence {len(gap)}")


def _fold_in_order(connection: Connection, book: Book, profile: Profile, node: str, now: float) -> None:
    """Fold this node's answered audits, oldest submission first, up to the first that is still unanswered."""
    rows = connection.execute(
        sa.select(AUDITS)
        .join(SUBMISSIONS, SUBMISSIONS.c.submission == AUDITS.c.submission)
        .where(AUDITS.c.node == node, AUDITS.c.outcome.is_(None), AUDITS.c.status != "cancelled")
        .order_by(SUBMISSIONS.c.received_at, AUDITS.c.audit)
    ).all()
    for row in rows:
        if row.status != "done":
            return
        _judge(connection, book, profile, row, now)


def _judge(connection: Connection, book: Book, profile: Profile, audit: Row[Any], now: float) -> None:
    evidence = unseal(msgspec.msgpack.decode(audit.evidence, type=Signed), KIND, Evidence)
    order = {rollout: i for i, rollout in enumerate(msgspec.json.decode(audit.rollouts, type=list[str]))}
    ranked = sorted(evidence.rollouts, key=lambda found: order[found.rollout])
    findings = [finding(profile, found) for found in ranked]
    node = node_row(connection, audit.node)
    before = standing.read(node)
    after, outcome = fold(before, findings, standing.settings(book))
    connection.execute(AUDITS.update().where(AUDITS.c.audit == audit.audit).values(outcome=outcome.kind))
    standing.write(connection, audit.node, after)
    if after.status != before.status:
        move(connection, "node", [audit.node], before.status, after.status, now, why=outcome.reason)
    if outcome.kind == "ok":
        _clear(connection, audit, now)
        return
    bad = [found.rollout for found in findings if is_bad_rollout(found.log_lr, book.config.trust.cap)]
    _void(connection, book, audit, bad, now)
    if outcome.kind == "eject":
        _eject(connection, book, audit.node, now)
    _pronounce(connection, book, audit, after, outcome, now)


def finding(profile: Profile, found: RolloutEvidence) -> Finding:
    """What one rollout's evidence comes to under a profile: its alternatives' likelihood ratios, averaged."""
    gap, margin = wire.unpack_floats(found.gap), wire.unpack_floats(found.margin)
    seen = tally(profile.edges, gap, margin)
    return Finding(found.rollout, len(gap), sum(seen.flips), average_log_ratio(profile, seen))


# --- effects ---------------------------------------------------------------------------------------------------------


def _clear(connection: Connection, audit: Row[Any], now: float) -> None:
    """The audit passed: what it held back goes on to the scorers."""
    query = sa.select(ROLLOUTS.c.rollout).where(ROLLOUTS.c.submission == audit.submission, ROLLOUTS.c.status == "held")
    held = list(connection.execute(query).scalars())
    move(connection, "rollout", held, "held", "received", now, audit=audit.audit)


def _void(connection: Connection, book: Book, audit: Row[Any], bad: Sequence[str], now: float) -> None:
    """A submission is void: its bad rollouts are rejected, the rest void with them, what was paid for it is burned."""
    of_it = ROLLOUTS.c.submission == audit.submission
    query = sa.select(ROLLOUTS.c.rollout).where(of_it, ROLLOUTS.c.rollout.in_(bad), ROLLOUTS.c.status == "held")
    rejected = list(connection.execute(query).scalars())
    move(connection, "rollout", rejected, "held", "rejected", now, audit=audit.audit)
    _void_rollouts(connection, book, of_it, audit.audit, audit.node, now)


def _void_rollouts(connection: Connection, book: Book, which: Any, cause: str, node: str, now: float) -> None:
    paid = sa.and_(which, ROLLOUTS.c.reward.is_not(None))
    _burn(connection, book, connection.execute(sa.select(ROLLOUTS).where(paid)).all(), node, now)
    for status in ("held", "received", "accepted"):
        rows = connection.execute(sa.select(ROLLOUTS).where(which, ROLLOUTS.c.status == status)).all()
        move(connection, "rollout", [row.rollout for row in rows], status, "void", now, cause=cause)
        if status == "accepted":
            _reopen(connection, [row.group for row in rows], now)


def _burn(connection: Connection, book: Book, rows: Sequence[Row[Any]], node: str, now: float) -> None:
    """What was paid for these goes to nobody; no more of it than the escrow holds, for the rest has matured."""
    left = ledger.balance(connection, ledger.escrow(node))
    transfers: list[ledger.Transfer] = []
    for row in rows:
        tokens = min(row.tokens, left)
        left -= tokens
        transfers.append(ledger.Transfer(row.rollout, ledger.escrow(node), ledger.BURNED, tokens))
    ledger.post(connection, transfers, book.run, now)


def _reopen(connection: Connection, groups: Sequence[str], now: float) -> None:
    """Groups that were complete lack a sample again."""
    query = sa.select(GROUPS.c.group).where(GROUPS.c.group.in_(groups), GROUPS.c.status == "complete")
    reopened = list(connection.execute(query).scalars())
    move(connection, "group", reopened, "complete", "open", now, why="a sample was voided")


def _eject(connection: Connection, book: Book, node: str, now: float) -> None:
    """All untrained work of the node is void, its leases go to others, its escrow to nobody."""
    query = sa.select(LEASES.c.lease).where(LEASES.c.node == node, LEASES.c.status == "open")
    end_leases(connection, list(connection.execute(query).scalars()), "void", now, why="the node was ejected")
    _void_rollouts(connection, book, ROLLOUTS.c.node == node, f"ejection of {node}", node, now)
    ledger.clear(connection, node, ledger.BURNED, f"ejection of {node}", book.run, now)
    waiting = sa.select(AUDITS.c.audit, AUDITS.c.status).where(
        AUDITS.c.node == node, AUDITS.c.status.in_(("open", "claimed"))
    )
    for row in connection.execute(waiting).all():
        move(connection, "audit", [row.audit], row.status, "cancelled", now, why="the node was ejected")


def _pronounce(
    connection: Connection, book: Book, audit: Row[Any], record: NodeRecord, outcome: Outcome, now: float
) -> None:
    verdict = Verdict(
        run=book.run,
        node=audit.node,
        audit=audit.audit,
        outcome="eject" if outcome.kind == "eject" else "void",
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
