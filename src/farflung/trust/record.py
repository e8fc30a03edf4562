"""What is known of a node: a value, and how the findings of an audit change it. Pure; no SQL, no clock."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from farflung.trust import evidence

Standing = Literal["probation", "trusted", "quarantined", "ejected"]
Count = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]


class TrustSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much is audited and what follows from it."""

    false_ejection_probability: Annotated[float, Meta(gt=0, lt=1)] = evidence.ALPHA
    """Bound α on the probability that an honest key is ever ejected, however long it stays."""
    arbitrary_share: Share = evidence.ETA
    """Share η of honest rollouts that may be arbitrarily bad."""
    cap: Annotated[float, Meta(gt=1)] = evidence.CAP
    """Most that one rollout counts against a key; also the likelihood ratio at which its submission is void."""
    probation_rollouts: Annotated[int, Meta(ge=1)] = 48
    """Clean audited rollouts in a row before a node is trusted."""
    probation_audits: Annotated[int, Meta(ge=1)] = 4
    """Rollouts audited of every submission while a node is on probation."""
    audit_scale: Annotated[float, Meta(ge=0)] = 1.0
    """A trusted node's rollout is audited with this probability ÷ its clean rollouts, but not below the floor."""
    audit_floor: Share = 0.02
    """Share of a trusted node's rollouts that is audited for ever."""


class NodeRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The record of one key, across steps and numerics profiles."""

    status: Standing = "probation"
    audited_rollouts: Count = 0
    """k of the test in `evidence`."""
    audited_tokens: Count = 0
    m: Annotated[float, Meta(ge=0)] = 0.0
    """M of the test: the evidence against this key so far."""
    clean_rollouts: Count = 0
    """Audited rollouts since the last bad one."""
    bad_rollouts: Count = 0
    submissions: Count = 0
    """Submissions taken in, audited or not."""


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the audit of one rollout came to."""

    rollout: str
    tokens: Count
    flips: Count
    """Tokens that were not what the seed gives, near-ties of honest numerics among them."""
    log_lr: float
    """ln of the likelihood ratio, cheating against honest (`evidence.log_ratio`)."""


class Outcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What follows for a submission and its node; fit for a receipt."""

    kind: Literal["ok", "void", "eject"]
    """`void`: this submission alone; `eject`: the node too, for ever."""
    statistic: float
    """M, or the likelihood ratio of the worst rollout if that is what voided the submission."""
    threshold: float
    """What the statistic would have had to stay below."""
    reason: str


def submitted(record: NodeRecord) -> NodeRecord:
    """Count one more submission."""
    return msgspec.structs.replace(record, submissions=record.submissions + 1)


def fold(record: NodeRecord, findings: Sequence[Finding], settings: TrustSettings) -> tuple[NodeRecord, Outcome]:
    """Take in the audit of one submission.

    Call it once per audit, and audits of one node in an order that does not depend on what they found; `findings` in
    the order of the rollouts' indices. The test in `evidence` is valid for such orders only.
    """
    if record.status == "ejected":
        return record, _already(record, settings)
    for finding in findings:
        record = _take(record, finding, settings)
        if evidence.is_ejected(record.m, settings.false_ejection_probability):
            return msgspec.structs.replace(record, status="ejected"), _eject(record, finding, settings)
    worst = max(findings, key=lambda finding: finding.log_lr, default=None)
    if worst is not None and evidence.is_bad_rollout(worst.log_lr, settings.cap):
        return _demote(record), _void(worst, settings)
    return _promote(record, settings), _pass(record, findings, settings)


def _take(record: NodeRecord, finding: Finding, settings: TrustSettings) -> NodeRecord:
    """One rollout into the sums and the process; what it means for the status is for the whole submission to say."""
    e = evidence.rollout_e(finding.log_lr, settings.cap, settings.arbitrary_share)
    m, k = evidence.fold(record.m, record.audited_rollouts, e)
    is_bad = evidence.is_bad_rollout(finding.log_lr, settings.cap)
    return msgspec.structs.replace(
        record,
        audited_rollouts=k,
        audited_tokens=record.audited_tokens + finding.tokens,
        m=m,
        clean_rollouts=0 if is_bad else record.clean_rollouts + 1,
        bad_rollouts=record.bad_rollouts + is_bad,
    )


def _demote(record: NodeRecord) -> NodeRecord:
    """Back to probation, where more is audited; siblings that passed beside a bad rollout earn nothing."""
    status = "quarantined" if record.status == "quarantined" else "probation"
    return msgspec.structs.replace(record, status=status, clean_rollouts=0)


def _promote(record: NodeRecord, settings: TrustSettings) -> NodeRecord:
    if record.status != "probation" or record.clean_rollouts < settings.probation_rollouts:
        return record
    return msgspec.structs.replace(record, status="trusted")


# --- sentences for receipts ------------------------------------------------------------------------------------------


def _pass(record: NodeRecord, findings: Sequence[Finding], settings: TrustSettings) -> Outcome:
    tokens = sum(finding.tokens for finding in findings)
    limit = 1 / settings.false_ejection_probability
    reason = f"{len(findings)} audited rollouts of {tokens} tokens pass; M = {record.m:.3g}, ejection is at {limit:.3g}"
    return Outcome("ok", record.m, limit, reason)


def _void(worst: Finding, settings: TrustSettings) -> Outcome:
    reason = f"{_flips(worst)}: its likelihood ratio {_power(worst.log_lr)} is not below {settings.cap:.3g}"
    return Outcome("void", math.exp(min(worst.log_lr, 690.0)), settings.cap, f"{reason}, so the submission is void")


def _eject(record: NodeRecord, finding: Finding, settings: TrustSettings) -> Outcome:
    alpha = settings.false_ejection_probability
    reason = (
        f"the evidence of {record.audited_rollouts} audited rollouts against this key is M = {record.m:.3g}, not below "
        f"{1 / alpha:.3g}, where an honest key ever comes with probability {alpha:.3g} at most; {_flips(finding)}"
    )
    return Outcome("eject", record.m, 1 / alpha, reason)


def _already(record: NodeRecord, settings: TrustSettings) -> Outcome:
    limit = 1 / settings.false_ejection_probability
    return Outcome("void", record.m, limit, f"this key was ejected before, with M = {record.m:.3g}; its work is void")


def _flips(finding: Finding) -> str:
    return f"{finding.flips} of the {finding.tokens} tokens of rollout {finding.rollout} are not what its seed gives"


def _power(log_lr: float) -> str:
    """A number that may be too large for a float."""
    return f"10^{log_lr / math.log(10):.1f}"
