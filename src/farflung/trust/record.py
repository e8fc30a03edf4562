"""A node's record as a value, and its change by the findings of an audit. Pure; no SQL, no clock.

`fold` quarantines and `confirm` ejects; `audits/verdict.py` asks them, `audits/penalties.py` carries an ejection out.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from farflung.trust import evidence, watch

WHOLE = 0.8
"""Weight of the process over all audits in M; a mixture of two processes with mean 1 has mean 1."""
HARDER = 6
"""After this many bad submissions probation grows no longer."""
Status = Literal["probation", "trusted", "quarantined", "ejected"]
Count = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Process = Annotated[tuple[float, ...], Meta(max_length=256)]


class TrustSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much is audited and what follows from it."""

    false_ejection_probability: Annotated[float, Meta(gt=0, lt=1)] = evidence.ALPHA
    """Bound α on the probability that an honest key is ever ejected, by any test, however long it stays."""
    arbitrary_share: Share = evidence.ETA
    """Share η of honest submissions that may be arbitrarily bad."""
    cap: Annotated[float, Meta(gt=1)] = evidence.CAP
    """Most that one submission counts against a key; also the likelihood ratio of one alternative that voids it."""
    probation_rollouts: Annotated[int, Meta(ge=1)] = 64
    """Clean audited rollouts in a row before a node is trusted; twice as many after each bad submission."""
    audit_scale: Annotated[float, Meta(ge=0)] = 1.0
    """A trusted node's rollout is audited with this probability ÷ its clean rollouts, but not below the floor."""
    audit_floor: Share = 0.01
    """Share of a trusted node's rollouts that is audited for ever, if the budget affords it."""
    audit_least: Share = 0.002
    """The same whatever the budget."""

    @property
    def limit(self) -> float:
        """Where the evidence of audits ejects."""
        return evidence.limit(self.false_ejection_probability)

    @property
    def serving_limit(self) -> float:
        """Where the evidence that flips serve a node ejects it."""
        return watch.limit(self.false_ejection_probability)


class Watched(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The sum of all replayed rollouts of a key, audited or not (`farflung.trust.watch`)."""

    groups: Count = 0
    """k of both tests: a node's samples of one task are taken together."""
    rollouts: Count = 0
    flips: Count = 0
    allowed: float = 0.0
    """Flips that honest arithmetic would have made at most, on average."""
    gain: float = 0.0
    """Reward by which flips lay above chance, summed."""
    excess: Process = (0.0,) * len(watch.EXCESS)
    steering: Process = (0.0,) * len(watch.STEERING)
    leaning: Process = (0.0,) * len(watch.LEANING)
    liked: Count = 0
    """Flips that sent a token which the policy likes better."""

    @property
    def serving(self) -> float:
        """The evidence that its flips serve it: the mean over both tests of where they go."""
        return (_mean(self.steering) + _mean(self.leaning)) / 2

    @property
    def statistic(self) -> float:
        """The larger of that and of the evidence that they are too many."""
        return max(_mean(self.excess), self.serving)


def _mean(process: Process) -> float:
    return sum(process) / len(process)


class NodeRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The record of one key, across steps and numerics profiles."""

    status: Status = "probation"
    audited_submissions: Count = 0
    """k of the test in `evidence`."""
    audited_rollouts: Count = 0
    audited_tokens: Count = 0
    m: Process = (0.0,) * len(evidence.ALTERNATIVES)
    """M of the test against each of `evidence.ALTERNATIVES`."""
    m_trusted: Process = (0.0,) * len(evidence.ALTERNATIVES)
    """The same over the audits that were drawn while it was trusted, and k of these: honesty on probation, where all is
    audited, is no evidence of honesty later."""
    audited_trusted: Count = 0
    m_before: Process = ()
    """`m` before the submission that put it over the threshold, while a second opinion on that one is awaited."""
    m_trusted_before: Process = ()
    clean_rollouts: Count = 0
    """Audited rollouts since the last bad submission."""
    bad_submissions: Count = 0
    submissions: Count = 0
    """Submissions taken in, audited or not."""
    trusted_tokens: Count = 0
    """Tokens that it handed in while it was trusted."""
    audited_trusted_tokens: Count = 0
    """Those of them that were drawn for audit, and those looked at because no step trains on them."""
    watched: Watched = Watched()

    @property
    def statistic(self) -> float:
        """The evidence against this key so far: the mean of M over alternatives and over both processes."""
        whole, trusted = sum(self.m) / len(self.m), sum(self.m_trusted) / len(self.m_trusted)
        return WHOLE * whole + (1 - WHOLE) * trusted

    @property
    def suspicion(self) -> str:
        """The alternative that explains it best, in words."""
        return evidence.describe(int(np.argmax(np.maximum(self.m, self.m_trusted))))


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The result of one rollout's audit."""

    rollout: str
    tokens: Count
    flips: Count
    """Tokens that were not what the seed gives, near-ties of honest numerics among them."""
    log_ratios: tuple[float, ...]
    """ln of the likelihood ratio against each of `evidence.CHEATS`."""
    allowed: float = 0.0
    """How many flips its profile allows on average."""
    liked: Count = 0
    """Flips that sent a token which the policy likes better."""

    @property
    def log_lr(self) -> float:
        """The same averaged: what this rollout weighs by itself."""
        return evidence.mean_log_ratio(np.array(self.log_ratios))


class Outcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The consequence for a submission and its node; fit for a receipt."""

    kind: Literal["ok", "void", "quarantine", "eject", "release"]
    """`void`: this submission alone; `quarantine`: the node too, until a second opinion ejects or releases it."""
    statistic: float
    """M, or the likelihood ratio of the submission if that is what voided it."""
    threshold: float
    """The bound that the statistic would have had to stay below."""
    reason: str


def submitted(record: NodeRecord, tokens: int) -> NodeRecord:
    """Count one more submission of so many tokens."""
    trusted = record.trusted_tokens + (tokens if record.status == "trusted" else 0)
    return msgspec.structs.replace(record, submissions=record.submissions + 1, trusted_tokens=trusted)


def fold(
    record: NodeRecord, findings: Sequence[Finding], settings: TrustSettings, *, was_trusted: bool = False
) -> tuple[NodeRecord, Outcome]:
    """Take in the audit of one submission, drawn while the node `was_trusted` or not.

    Call it once per audit, and audits of one node in an order that does not depend on what they found. The test in
    `evidence` is valid for such orders only. Not for a quarantined node: what it sent waits for the second opinion.
    """
    if record.status == "ejected":
        return record, _already(record, settings)
    total = _total(findings)
    after = _count(_advance(record, total, settings, was_trusted=was_trusted), findings, was_trusted=was_trusted)
    if after.statistic >= settings.limit:
        after = msgspec.structs.replace(demote(after), status="quarantined")
        after = msgspec.structs.replace(after, m_before=record.m, m_trusted_before=record.m_trusted)
        return after, _exceed("quarantine", after, findings, settings)
    if evidence.is_void(total, settings.cap):
        return demote(after), _void(total, findings, settings)
    return _promote(after, settings), _pass(after, findings, settings)


def weigh(
    record: NodeRecord, findings: Sequence[Finding], settings: TrustSettings, *, was_trusted: bool = False
) -> tuple[NodeRecord, Outcome]:
    """Take in an audit that was opened because of what the rollouts looked like.

    It may void them and send the node back to probation, where all that follows is audited and counted; but M stays as
    it is, for evidence that was looked for where it showed already has a mean above 1.
    """
    total = _total(findings)
    after = msgspec.structs.replace(
        record,
        audited_rollouts=record.audited_rollouts + len(findings),
        audited_tokens=record.audited_tokens + sum(finding.tokens for finding in findings),
    )
    if evidence.is_void(total, settings.cap):
        return demote(after), _void(total, findings, settings)
    return after, _pass(after, findings, settings)


def confirm(
    record: NodeRecord, findings: Sequence[Finding], settings: TrustSettings, *, was_trusted: bool = False
) -> tuple[NodeRecord, Outcome]:
    """Take in the second opinion on the submission that put a node into quarantine: the milder of the two counts.

    The test stays valid, since no e-value grows by it. Only for a quarantined node; `was_trusted` as in `fold`.
    """
    total = _total(findings)
    before = msgspec.structs.replace(
        record,
        m=record.m_before,
        m_trusted=record.m_trusted_before,
        audited_submissions=record.audited_submissions - 1,
        audited_trusted=record.audited_trusted - was_trusted,
    )
    after = _advance(before, total, settings, was_trusted=was_trusted)
    milder = {name: tuple(map(min, getattr(after, name), getattr(record, name))) for name in ("m", "m_trusted")}
    after = msgspec.structs.replace(after, m_before=(), m_trusted_before=(), **milder)
    if after.statistic >= settings.limit:
        return msgspec.structs.replace(after, status="ejected"), _exceed("eject", after, findings, settings)
    released = msgspec.structs.replace(after, status="probation")
    if evidence.is_void(total, settings.cap):
        return released, _void(total, findings, settings)
    return released, _release(released, settings)


def watch_groups(
    record: NodeRecord, groups: Sequence[Sequence[watch.WatchedRollout]], settings: TrustSettings
) -> tuple[NodeRecord, Outcome]:
    """Take in replayed rollouts, a node's samples of one task at a time, each rollout once in its life.

    A node whose flips follow reward, or what the policy likes, is ejected: within the noise nothing else would ever
    show it. One that merely flips more often than its profile allows goes back to probation, where audits settle it.
    """
    watched = record.watched
    for looks in groups:
        ratios = watch.group_ratios(looks)._asdict()
        watched = msgspec.structs.replace(
            watched,
            groups=watched.groups + 1,
            rollouts=watched.rollouts + len(looks),
            flips=watched.flips + sum(look.flips for look in looks),
            liked=watched.liked + sum(look.liked for look in looks),
            allowed=watched.allowed + sum(look.allowed for look in looks),
            gain=watched.gain + watch.gain(looks),
            **{name: watch.fold(getattr(watched, name), watched.groups, found) for name, found in ratios.items()},
        )
    after = msgspec.structs.replace(record, watched=watched)
    return _watchful(record, after, settings)


def _watchful(record: NodeRecord, after: NodeRecord, settings: TrustSettings) -> tuple[NodeRecord, Outcome]:
    watched, limit = after.watched, settings.serving_limit
    serving, m = watched.serving, watched.statistic
    text = (
        f"{watched.flips} flips in {watched.rollouts} replayed rollouts, {watched.allowed:.3g} allowed, "
        f"{watched.liked} of them to tokens that the policy likes better, reward {watched.gain:+.3g}"
    )
    if serving >= limit:
        follow = "reward" if _mean(watched.steering) > _mean(watched.leaning) else "what the policy likes"
        reason = f"its flips follow {follow}: M = {serving:.3g}, the limit is {limit:.3g}; {text}"
        return msgspec.structs.replace(after, status="ejected"), Outcome("eject", serving, limit, reason)
    if m >= watch.WARY and record.status == "trusted":
        reason = f"its flips are too many or serve it: M = {m:.3g}, above {watch.WARY:.3g} all is audited; {text}"
        return demote(after), Outcome("void", m, watch.WARY, reason)
    return after, Outcome("ok", m, limit, text)


def _total(findings: Sequence[Finding]) -> np.ndarray:
    return evidence.submission_log_ratios([np.array(finding.log_ratios) for finding in findings])


def _advance(record: NodeRecord, log_ratios: np.ndarray, settings: TrustSettings, *, was_trusted: bool) -> NodeRecord:
    """Both processes after one more audited submission; the one of the trusted time moves in that time alone."""
    e = evidence.e_values(log_ratios, settings.cap, settings.arbitrary_share)
    m, k = evidence.fold(np.array(record.m), record.audited_submissions, e)
    after = msgspec.structs.replace(record, m=tuple(m.tolist()), audited_submissions=k)
    if not was_trusted:
        return after
    m, k = evidence.fold(np.array(record.m_trusted), record.audited_trusted, e)
    return msgspec.structs.replace(after, m_trusted=tuple(m.tolist()), audited_trusted=k)


def _count(record: NodeRecord, findings: Sequence[Finding], *, was_trusted: bool) -> NodeRecord:
    tokens = sum(finding.tokens for finding in findings)
    return msgspec.structs.replace(
        record,
        audited_rollouts=record.audited_rollouts + len(findings),
        audited_tokens=record.audited_tokens + tokens,
        audited_trusted_tokens=record.audited_trusted_tokens + was_trusted * tokens,
        clean_rollouts=record.clean_rollouts + len(findings),
    )


def demote(record: NodeRecord) -> NodeRecord:
    """Back to probation, where all is audited, unless it stands worse; the good beside the bad earn nothing."""
    status = record.status if record.status in ("quarantined", "ejected") else "probation"
    bad = record.bad_submissions + 1
    return msgspec.structs.replace(record, status=status, clean_rollouts=0, bad_submissions=bad)


def _promote(record: NodeRecord, settings: TrustSettings) -> NodeRecord:
    if record.status != "probation" or record.clean_rollouts < needed(record, settings):
        return record
    return msgspec.structs.replace(record, status="trusted")


def needed(record: NodeRecord, settings: TrustSettings) -> int:
    """Clean rollouts in a row that end probation."""
    return settings.probation_rollouts << min(record.bad_submissions, HARDER)


# --- sentences for receipts ------------------------------------------------------------------------------------------


def _pass(record: NodeRecord, findings: Sequence[Finding], settings: TrustSettings) -> Outcome:
    tokens = sum(finding.tokens for finding in findings)
    limit, m = settings.limit, record.statistic
    reason = f"{len(findings)} audited rollouts of {tokens} tokens pass; M = {m:.3g}, ejection is at {limit:.3g}"
    return Outcome("ok", m, limit, reason)


def _void(log_ratios: np.ndarray, findings: Sequence[Finding], settings: TrustSettings) -> Outcome:
    log_lr, likeliest = float(log_ratios.max()), evidence.describe(int(log_ratios.argmax()))
    reason = (
        f"{_flips(findings)}: the likelihood ratio {_power(log_lr)} for {likeliest} is not below {settings.cap:.3g}, "
        "so the submission is void"
    )
    return Outcome("void", math.exp(min(log_lr, 690.0)), settings.cap, reason)


def _exceed(
    kind: Literal["quarantine", "eject"], record: NodeRecord, findings: Sequence[Finding], settings: TrustSettings
) -> Outcome:
    limit, m, alpha = settings.limit, record.statistic, settings.false_ejection_probability
    reason = (
        f"the evidence of {record.audited_submissions} audited submissions against this key is M = {m:.3g}, the limit "
        f"is {limit:.3g}; an honest key is ever ejected with probability {alpha:.3g} at most; {_flips(findings)}; "
        f"most like {record.suspicion}"
    )
    return Outcome(kind, m, limit, reason)


def _release(record: NodeRecord, settings: TrustSettings) -> Outcome:
    limit, m = settings.limit, record.statistic
    reason = f"a second opinion does not confirm the first: with it M = {m:.3g}, ejection is at {limit:.3g}"
    return Outcome("release", m, limit, reason)


def _already(record: NodeRecord, settings: TrustSettings) -> Outcome:
    limit, m = settings.limit, record.statistic
    return Outcome("void", m, limit, f"this key was ejected before, with M = {m:.3g}; its work is void")


def _flips(findings: Sequence[Finding]) -> str:
    flips, tokens = sum(f.flips for f in findings), sum(f.tokens for f in findings)
    worst = max(findings, key=lambda finding: finding.log_lr)
    named = f"{worst.flips} of them in {worst.rollout}"
    return f"{flips} of the {tokens} audited tokens are not what the seeds give, {named}"


def _power(log_lr: float) -> str:
    """A number that may be too large for a float."""
    return f"10^{log_lr / math.log(10):.1f}"
