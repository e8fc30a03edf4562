"""How the findings of an audit change a node's record."""

import msgspec
import pytest

from farflung.config import Config
from farflung.protocol import states
from farflung.trust.evidence import CHEATS
from farflung.trust.record import Finding, NodeRecord, TrustSettings, confirm, fold, submitted, weigh

SETTINGS = TrustSettings(probation_rollouts=8)
TRUSTED = NodeRecord("trusted", audited_submissions=2, audited_rollouts=8, audited_tokens=160, clean_rollouts=8)


def test_a_run_by_default_has_the_numbers_that_the_test_was_worked_out_for() -> None:
    configured = Config().trust
    for name in TrustSettings.__struct_fields__:
        assert getattr(configured, name) == getattr(TrustSettings(), name), name


def good(count: int) -> list[Finding]:
    return [Finding(f"r{i}", tokens=20, flips=0, log_ratios=(-3.0,) * len(CHEATS)) for i in range(count)]


def bad(count: int, log_lr: float = 40.0) -> list[Finding]:
    return [Finding(f"b{i}", tokens=20, flips=13, log_ratios=(log_lr,) * len(CHEATS)) for i in range(count)]


def cheating(record: NodeRecord, times: int) -> NodeRecord:
    for _ in range(times):
        record, _ = fold(record, bad(2), SETTINGS)
    return record


def test_probation_ends_after_so_many_clean_rollouts() -> None:
    record, outcome = fold(NodeRecord(), good(4), SETTINGS)
    assert (record.status, record.clean_rollouts, outcome.kind) == ("probation", 4, "ok")
    record, outcome = fold(record, good(4), SETTINGS)
    assert (record.status, record.audited_rollouts, record.audited_tokens) == ("trusted", 8, 160)
    assert record.audited_submissions == 2
    assert outcome.reason.startswith("4 audited rollouts of 80 tokens pass; M = ")


def test_one_bad_rollout_voids_and_returns_to_probation_but_never_ejects() -> None:
    record, outcome = fold(TRUSTED, good(2) + bad(1, 1e6) + good(1), SETTINGS)
    assert (record.status, record.clean_rollouts, record.bad_submissions) == ("probation", 0, 1)
    assert (outcome.kind, outcome.threshold) == ("void", SETTINGS.cap)
    assert outcome.statistic > 1e299


def test_the_receipt_of_a_bad_submission() -> None:
    _, outcome = fold(TRUSTED, good(1) + bad(1), SETTINGS)
    assert outcome.reason.startswith(
        "13 of the 40 audited tokens are not what the seeds give, 13 of them in b0: the likelihood ratio 10^"
    )
    assert outcome.reason.endswith(f"is not below {SETTINGS.cap:.3g}, so the submission is void")


def test_flagrant_cheating_ends_in_quarantine_at_the_third_submission() -> None:
    record, outcome = fold(cheating(NodeRecord(), 2), bad(2), SETTINGS)
    assert (record.status, record.audited_submissions, outcome.kind) == ("quarantined", 3, "quarantine")
    assert outcome.statistic == record.statistic >= outcome.threshold == SETTINGS.limit
    assert outcome.reason.startswith("the evidence of 3 audited submissions against this key is M = ")
    assert len(outcome.reason) <= 500


@pytest.mark.parametrize(("honest", "extra"), [(0, 3), (10, 3), (100, 4), (1000, 5)])
def test_a_node_that_turns_late_costs_two_ln_k_more(honest: int, extra: int) -> None:
    record = NodeRecord()
    for _ in range(honest):
        record, _ = fold(record, good(2), SETTINGS)
    assert cheating(record, extra - 1).status != "quarantined"
    assert cheating(record, extra).status == "quarantined"


@pytest.mark.parametrize("size", [1, 4])
def test_honesty_on_probation_buys_nothing_later(size: int) -> None:
    """Garbage while trusted, honest on probation in small submissions: the process of the trusted time keeps count."""
    record, finds = NodeRecord(), 0
    while record.status != "quarantined" and finds < 8:
        if record.status == "trusted":
            record, _ = fold(record, bad(1), SETTINGS, was_trusted=True)
            finds += 1
        else:
            record, _ = fold(record, good(size), SETTINGS)
    assert finds <= 4


def test_probation_is_twice_as_long_after_each_bad_submission() -> None:
    record, _ = fold(TRUSTED, bad(2), SETTINGS)
    once, _ = fold(record, good(8), SETTINGS)
    twice, _ = fold(once, good(8), SETTINGS)
    assert (record.status, once.status, twice.status) == ("probation", "probation", "trusted")


def test_a_second_opinion_ejects_or_releases() -> None:
    suspect = cheating(NodeRecord(), 3)
    gone, outcome = confirm(suspect, bad(2), SETTINGS)
    assert (gone.status, gone.audited_submissions, outcome.kind) == ("ejected", 3, "eject")
    free, outcome = confirm(suspect, good(2), SETTINGS)
    assert (free.status, free.clean_rollouts, free.m_before, outcome.kind) == ("probation", 0, (), "release")
    assert free.statistic < SETTINGS.limit


def test_what_was_looked_for_voids_but_never_counts() -> None:
    for record in (TRUSTED, NodeRecord(), NodeRecord("quarantined")):
        after, outcome = weigh(record, bad(9, 1e5), SETTINGS)
        assert (outcome.kind, after.m, after.audited_submissions) == ("void", record.m, record.audited_submissions)
        assert after.status == ("quarantined" if record.status == "quarantined" else "probation")
    assert weigh(TRUSTED, good(1), SETTINGS)[0].clean_rollouts == TRUSTED.clean_rollouts


def test_ejection_is_for_ever() -> None:
    gone, _ = confirm(cheating(NodeRecord(), 3), bad(2), SETTINGS)
    record, outcome = fold(gone, good(100), SETTINGS)
    assert record == gone
    assert (outcome.kind, "was ejected before" in outcome.reason) == ("void", True)


def test_submissions_are_counted_whether_audited_or_not() -> None:
    assert submitted(submitted(TRUSTED, 5), 5).submissions == 2


def test_every_change_of_status_is_legal() -> None:
    for status in ("probation", "trusted", "ejected"):
        for findings in (good(9), bad(1), bad(9)):
            for how in (fold, weigh):
                after = how(NodeRecord(status, clean_rollouts=4), findings, SETTINGS)[0].status
                assert after == status or states.is_legal("node", status, after)


def test_a_record_survives_json() -> None:
    record, _ = fold(NodeRecord(), good(3), SETTINGS)
    assert msgspec.json.decode(msgspec.json.encode(record), type=NodeRecord) == record
