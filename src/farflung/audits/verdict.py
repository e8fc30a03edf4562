"""Coordinator: take signed evidence, fold it into the node's record, pronounce the verdict.

Evidence is kept as it comes but folded per node in the order of submission: the test is valid for orders that are
fixed before the evidence is known, and for no others. While the circuit breaker is open nothing is folded.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.audits import breaker, canary, node_record, penalties, steering
from farflung.audits.audit import open_audit, profile_of, verify_in
from farflung.audits.pronounce import pronounce
from farflung.protocol import wire
from farflung.protocol.errors import FailedCanary, Malformed, NotFound
from farflung.protocol.identity import Signed, unseal
from farflung.protocol.messages import Evidence, RolloutEvidence, Verdict
from farflung.store.run import RunContext, node_row
from farflung.store.tables import AUDITS, ROLLOUTS, SUBMISSIONS
from farflung.store.transitions import move
from farflung.trust.diagnose import AS_LEASED, diagnose
from farflung.trust.evidence import (
    ODD,
    Profile,
    Profiles,
    Seen,
    is_bad,
    is_void,
    log_ratios,
    mean_log_ratio,
    submission_log_ratios,
)
from farflung.trust.record import Finding, NodeRecord, Outcome, confirm, fold, weigh
from farflung.trust.watch import count_flips

KIND = "evidence"


# --- evidence --------------------------------------------------------------------------------------------------------


def take_evidence(
    connection: Connection, run_ctx: RunContext, profiles: Profiles, validator: str, signed: Signed, now: float
) -> int:
    """Keep one audit's evidence and fold what can be folded of that node. Gives 0 if it was there already.

    Raises FailedCanary for a validator that has not passed the canaries of the audit's step; anybody may answer then.
    """
    evidence = unseal(signed, KIND, Evidence)
    if (taken := canary.take(connection, run_ctx, profiles, validator, evidence, now)) is not None:
        return taken
    audit = connection.execute(sa.select(AUDITS).where(AUDITS.c.audit == evidence.audit)).first()
    if audit is None or audit.run != run_ctx.run:
        raise NotFound(f"run {run_ctx.run!r} has no audit {evidence.audit}")
    if audit.status != "claimed" or audit.claimed_by != validator:
        return 0
    profile = profile_of(connection, profiles, audit.submission)
    if not canary.has_passed(connection, run_ctx, validator, audit.step, verify_in(profile, audit.kind)):
        raise FailedCanary(f"validator {validator} has not passed the canaries of step {audit.step}; claim again")
    _check(connection, run_ctx, audit, evidence, profile)
    connection.execute(
        AUDITS.update().where(AUDITS.c.audit == audit.audit).values(evidence=msgspec.msgpack.encode(signed))
    )
    move(connection, "audit", [audit.audit], "claimed", "done", now, validator=validator)
    _fold_in_order(connection, run_ctx, profiles, audit.node, now)
    return 1


def _check(connection: Connection, run_ctx: RunContext, audit: Row[Any], evidence: Evidence, profile: Profile) -> None:
    """Evidence must be about the drawn rollouts, every token of them, under the leased weights, in an arithmetic that
    the node's profile was calibrated with: in any other the honest look like cheats.

    Of a submission whose first rollouts void it already, the rest may be left out.
    """
    drawn = msgspec.json.decode(audit.rollouts, type=list[str])
    found = [one.rollout for one in evidence.rollouts]
    if found != drawn[: len(found)]:
        raise Malformed(f"audit {audit.audit} drew {drawn}; the evidence is about {found}")
    if evidence.manifest != run_ctx.manifest_of(connection, audit.step) or evidence.profile != profile.name:
        raise Malformed(f"audit {audit.audit} is of other weights or another profile than {profile.name!r}")
    if evidence.arithmetic not in profile.verified_in:
        known = " or ".join(profile.verified_in)
        raise Malformed(f"profile {profile.name!r} was verified in {known}; this evidence is in {evidence.arithmetic}")
    query = sa.select(ROLLOUTS.c.rollout, ROLLOUTS.c.tokens).where(ROLLOUTS.c.rollout.in_(drawn))
    tokens: dict[str, int] = {row.rollout: row.tokens for row in connection.execute(query)}
    findings = [finding(profile, one) for one in evidence.rollouts]
    for one in findings:
        if one.tokens != tokens[one.rollout]:
            raise Malformed(f"rollout {one.rollout} has {tokens[one.rollout]} tokens, its evidence {one.tokens}")
    if len(found) < len(drawn) and (audit.kind == "confirm" or not is_decisive(findings, run_ctx.config.trust.cap)):
        raise Malformed(f"audit {audit.audit} drew {len(drawn)} rollouts; the evidence on {len(found)} voids nothing")


def is_decisive(findings: Sequence[Finding], cap: float) -> bool:
    """Whether these findings void their submission."""
    ratios = submission_log_ratios([np.array(one.log_ratios) for one in findings])
    return is_void(ratios, cap)


def fold_all(connection: Connection, run_ctx: RunContext, profiles: Profiles, now: float) -> None:
    """Fold what was kept while the circuit breaker was open."""
    waiting = sa.and_(AUDITS.c.run == run_ctx.run, AUDITS.c.outcome.is_(None), AUDITS.c.status == "done")
    for node in list(connection.execute(sa.select(AUDITS.c.node).where(waiting).distinct()).scalars()):
        _fold_in_order(connection, run_ctx, profiles, node, now)


def _fold_in_order(connection: Connection, run_ctx: RunContext, profiles: Profiles, node: str, now: float) -> None:
    """Fold this node's answered audits, oldest submission first, up to the first that is still unanswered."""
    rows = connection.execute(
        sa.select(AUDITS, SUBMISSIONS.c.profile, SUBMISSIONS.c.audit_probability, SUBMISSIONS.c.received_at)
        .join(SUBMISSIONS, SUBMISSIONS.c.submission == AUDITS.c.submission)
        .where(AUDITS.c.node == node, AUDITS.c.outcome.is_(None), AUDITS.c.status != "cancelled")
        .order_by(AUDITS.c.kind != "confirm", AUDITS.c.kind != "suspicion", SUBMISSIONS.c.received_at, AUDITS.c.audit)
    ).all()
    for row in rows:
        if breaker.is_open(connection, run_ctx):
            return
        if row.status == "done":
            _decide(connection, run_ctx, profiles.of(row.profile), row, now)
        elif row.kind != "suspicion":
            return


FOLDS = {"draw": fold, "suspicion": weigh, "confirm": confirm}
"""How the findings of each kind of audit change a record."""


def _decide(connection: Connection, run_ctx: RunContext, profile: Profile, audit: Row[Any], now: float) -> None:
    evidence = unseal(msgspec.msgpack.decode(audit.evidence, type=Signed), KIND, Evidence)
    findings = [finding(profile, one) for one in evidence.rollouts]
    node = node_row(connection, audit.node)
    before = node_record.read(node)
    if before.status == "quarantined" and audit.kind == "draw":
        return  # it waits for the second opinion
    was_trusted = audit.audit_probability < 1
    take_in = FOLDS[audit.kind] if audit.kind != "draw" or _is_news(connection, audit, findings) else weigh
    after, outcome = take_in(before, findings, node_record.settings(run_ctx), was_trusted=was_trusted)
    connection.execute(AUDITS.update().where(AUDITS.c.audit == audit.audit).values(outcome=outcome.kind))
    node_record.write(connection, audit.node, after)
    if after.status != before.status:
        move(connection, "node", [audit.node], before.status, after.status, now, why=outcome.reason)
    steering.note(connection, findings)
    _take_effect(connection, run_ctx, audit, findings, outcome, now)
    if outcome.kind != "ok":
        _pronounce(connection, run_ctx, audit, before, after, outcome, _diagnosis(profile, evidence), now)
        if outcome.kind == "release" and _is_contradicted(connection, run_ctx, profile, audit, findings):
            breaker.disagree(connection, run_ctx, audit.step, now)
        if breaker.check(connection, run_ctx, audit.step, audit.profile, now):
            penalties.hold_alike(connection, run_ctx, audit.profile, now)


def _is_news(connection: Connection, audit: Row[Any], findings: Sequence[Finding]) -> bool:
    """Whether this node handed in no other rollout of these samples before.

    Such samples are not leased to it again; this holds whatever the leases did. The seed is the same, so that given the
    flips of the first rollout those of the second are no news, and counted again they would eject the honest.
    """
    this, other = ROLLOUTS.alias(), ROLLOUTS.alias()
    is_same = sa.and_(other.c.group == this.c.group, other.c.sample == this.c.sample, other.c.node == audit.node)
    query = (
        sa.select(this.c.rollout)
        .join(other, sa.and_(is_same, other.c.rollout != this.c.rollout))
        .join(SUBMISSIONS, SUBMISSIONS.c.submission == other.c.submission)
        .where(this.c.rollout.in_([found.rollout for found in findings]))
        .where(SUBMISSIONS.c.received_at < audit.received_at)
    )
    return connection.execute(query.limit(1)).first() is None


def _is_contradicted(
    connection: Connection, run_ctx: RunContext, profile: Profile, audit: Row[Any], second: Sequence[Finding]
) -> bool:
    """Whether the first opinion voids what the second finds honest: a node's near-ties may turn an opinion, but only a
    broken verifier turns it so far."""
    condemned = sa.and_(AUDITS.c.submission == audit.submission, AUDITS.c.outcome == "quarantine")
    first = connection.execute(sa.select(AUDITS.c.evidence).where(condemned)).scalars().first()
    if first is None:
        return False
    evidence = unseal(msgspec.msgpack.decode(first, type=Signed), KIND, Evidence)
    found = [finding(profile, one) for one in evidence.rollouts]
    ratios = submission_log_ratios([np.array(one.log_ratios) for one in second])
    return is_decisive(found, run_ctx.config.trust.cap) and not is_bad(mean_log_ratio(ratios), ODD)


def _diagnosis(profile: Profile, evidence: Evidence) -> str:
    """The explanation of a suspect's rollouts, if the validator tried for one."""
    tried = {one.name: [seen_of(found) for found in one.rollouts] for one in evidence.explanations}
    leased = tried.pop(AS_LEASED, None) or [seen_of(found) for found in evidence.rollouts]
    try:
        return diagnose(profile, leased, tried)
    except ValueError as error:
        raise Malformed(f"evidence on audit {evidence.audit}: {error}") from error


def _take_effect(
    connection: Connection,
    run_ctx: RunContext,
    audit: Row[Any],
    findings: Sequence[Finding],
    outcome: Outcome,
    now: float,
) -> None:
    match outcome.kind:
        case "ok" | "release":
            suspicious = [found.rollout for found in findings if is_bad(found.log_lr, ODD)]
            penalties.clear(connection, run_ctx, audit, suspicious, now)
        case "void":
            bad = [f.rollout for f in findings if is_bad(f.log_lr, run_ctx.config.trust.cap)]
            penalties.void(connection, run_ctx, audit, bad, now)
            penalties.hold(connection, run_ctx, ROLLOUTS.c.node == audit.node, f"audit {audit.audit} failed", now)
        case "quarantine":
            submission = sa.select(SUBMISSIONS).where(SUBMISSIONS.c.submission == audit.submission)
            rollouts = [found.rollout for found in findings]
            open_audit(connection, run_ctx, connection.execute(submission).one(), rollouts, "confirm", now)
            penalties.hold(connection, run_ctx, ROLLOUTS.c.node == audit.node, "its node is in quarantine", now)
        case "eject":
            bad = [found.rollout for found in findings if is_bad(found.log_lr, run_ctx.config.trust.cap)]
            penalties.void(connection, run_ctx, audit, bad, now)
            penalties.eject(connection, run_ctx, audit.node, now)


def finding(profile: Profile, found: RolloutEvidence) -> Finding:
    """The finding from one rollout's evidence under a profile. Raises Malformed for numbers that no replay gives."""
    seen = seen_of(found)
    try:
        ratios = log_ratios(profile, seen)
    except ValueError as error:
        raise Malformed(f"evidence on rollout {found.rollout}: {error}") from error
    counted = count_flips(profile, seen)._asdict()
    return Finding(found.rollout, len(seen.gap), log_ratios=tuple(ratios.tolist()), **counted)


def seen_of(found: RolloutEvidence) -> Seen:
    """The content of a validator's arrays."""
    return Seen(*(wire.unpack_floats(getattr(found, name)) for name in Seen._fields))


def _pronounce(
    connection: Connection,
    run_ctx: RunContext,
    audit: Row[Any],
    before: NodeRecord,
    record: NodeRecord,
    outcome: Outcome,
    diagnosis: str,
    now: float,
) -> None:
    reason = f"{outcome.reason}; explained by {diagnosis}" if diagnosis else outcome.reason
    verdict = Verdict(
        run=run_ctx.run,
        node=audit.node,
        audit=audit.audit,
        outcome=outcome.kind,
        diagnosis=diagnosis,
        statistic=outcome.statistic,
        threshold=outcome.threshold,
        reason=reason[:500],
        decided_at=now,
    )
    was_trusted = before.status == "trusted"
    about = {"step": audit.step, "profile": audit.profile, "was_trusted": was_trusted}
    pronounce(connection, run_ctx, verdict, record.submissions, **about)
