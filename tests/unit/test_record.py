"""How the findings of an audit change a node's record."""

import math

import msgspec
import pytest

from farflung.protocol import states
from farflung.trust.record import Finding, NodeRecord, TrustSettings, fold, submitted

SETTINGS = TrustSettings(probation_rollouts=8)
TRUSTED = NodeRecord("trusted", audited_rollouts=8, audited_tokens=160, clean_rollouts=8)


def good(count: int) -> list[Finding]:
    return [Finding(f"r{i}", tokens=20, flips=0, log_lr=-3.0) for i in range(count)]


def bad(count: int, log_lr: float = 40.0) -> list[Finding]:
    return [Finding(f"b{i}", tokens=20, flips=13, log_lr=log_lr) for i in range(count)]


def test_probation_ends_after_so_many_clean_rollouts() -> None:
    record, outcome = fold(NodeRecord(), good(4), SETTINGS)
    assert (record.status, record.clean_rollouts, outcome.kind) == ("probation", 4, "ok")
    record, outcome = fold(record, good(4), SETTINGS)
    assert (record.status, record.audited_rollouts, record.audited_tokens) == ("trusted", 8, 160)
    assert outcome.reason.startswith("4 audited rollouts of 80 tokens pass; M = ")


def test_one_bad_rollout_voids_and_returns_to_probation_but_never_ejects() -> None:
    record, outcome = fold(TRUSTED, good(2) + bad(1, math.inf) + good(1), SETTINGS)
    assert (record.status, record.clean_rollouts, record.bad_rollouts) == ("probation", 0, 1)
    assert (outcome.kind, outcome.threshold) == ("void", 100)
    assert outcome.statistic > 1e299


def test_the_receipt_of_a_bad_rollout() -> None:
    _, outcome = fold(TRUSTED, bad(1), SETTINGS)
    assert outcome.reason == (
        "13 of the 20 tokens of rollout b0 are not what its seed gives: "
        "its likelihood ratio 10^17.4 is not below 100, so the submission is void"
    )
    assert outcome.statistic == pytest.approx(math.exp(40))


def test_flagrant_cheating_ejects_at_the_fourth_audited_rollout() -> None:
    record, outcome = fold(NodeRecord(), bad(6), SETTINGS)
    assert (record.status, record.audited_rollouts, outcome.kind) == ("ejected", 4, "eject")
    assert outcome.statistic == record.m >= outcome.threshold == 1 / SETTINGS.false_ejection_probability
    assert outcome.reason.startswith("the evidence of 4 audited rollouts against this key is M = ")
    assert len(outcome.reason) <= 500


@pytest.mark.parametrize(("honest", "extra"), [(0, 4), (10, 5), (100, 6), (1000, 7)])
def test_a_node_that_turns_late_costs_two_ln_k_more(honest: int, extra: int) -> None:
    record, _ = fold(NodeRecord(), good(honest), SETTINGS)
    record, _ = fold(record, bad(20), SETTINGS)
    assert (record.status, record.audited_rollouts) == ("ejected", honest + extra)


def test_ejection_is_for_ever() -> None:
    gone, _ = fold(NodeRecord(), bad(4), SETTINGS)
    record, outcome = fold(gone, good(100), SETTINGS)
    assert record == gone
    assert (outcome.kind, "was ejected before" in outcome.reason) == ("void", True)


def test_quarantine_stays_until_somebody_decides() -> None:
    quarantined = NodeRecord("quarantined", clean_rollouts=3)
    assert fold(quarantined, good(20), SETTINGS)[0].status == "quarantined"
    assert fold(quarantined, bad(1), SETTINGS)[0].status == "quarantined"
    assert fold(quarantined, bad(4), SETTINGS)[0].status == "ejected"


def test_an_audit_without_findings_changes_nothing() -> None:
    assert fold(TRUSTED, [], SETTINGS)[0] == TRUSTED


def test_submissions_are_counted_whether_audited_or_not() -> None:
    assert submitted(submitted(TRUSTED)).submissions == 2


def test_every_change_of_status_is_legal() -> None:
    for status in states.statuses("node"):
        for findings in (good(9), bad(1), bad(9)):
            after = fold(NodeRecord(status, clean_rollouts=4), findings, SETTINGS)[0].status
            assert after == status or states.is_legal("node", status, after)


def test_a_record_survives_json() -> None:
    record, _ = fold(NodeRecord(), good(3), SETTINGS)
    assert msgspec.json.decode(msgspec.json.encode(record), type=NodeRecord) == record
