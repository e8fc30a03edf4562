"""Whom to audit, and what that catches."""

import numpy as np
import pytest

from farflung.trust.audit_policy import (
    NodeRecord,
    Poll,
    TrustSettings,
    affordable,
    audit_probability,
    draw,
    is_breaker_due,
    is_doubtful,
    probability_caught,
)
from farflung.trust.evidence import CHEATS
from farflung.trust.record import Finding, fold, submitted

KEY, DIGEST = bytes(range(32)), bytes(32)
SETTINGS = TrustSettings()


def trusted(clean: int) -> NodeRecord:
    return NodeRecord("trusted", clean_rollouts=clean)


def clean(tokens: int) -> Finding:
    """Of a rollout in which every token was the seed's."""
    return Finding("r", tokens, 0, (-0.01,) * len(CHEATS))


def drawn(record: NodeRecord, lease: str = "l1", digest: bytes = DIGEST, size: int = 16, **changes) -> tuple[int, ...]:
    return draw(KEY, lease, digest, size, audit_probability(record, TrustSettings(**changes)))


@pytest.mark.parametrize("status", ["probation", "quarantined"])
def test_without_trust_every_submission_is_audited(status: str) -> None:
    record = NodeRecord(status, clean_rollouts=1000)
    assert audit_probability(record, SETTINGS) == 1
    assert drawn(record, size=3) == (0, 1, 2)
    assert drawn(record, size=0) == ()


def test_the_probability_falls_with_the_record_to_a_floor() -> None:
    found = [audit_probability(trusted(clean), SETTINGS) for clean in (1, 10, 40, 100, 101, 10**9)]
    assert found == [1, 0.1, 0.025, 0.01, 0.01, 0.01]
    assert audit_probability(trusted(0), SETTINGS) == 1


def test_the_draw_is_a_pure_function_of_key_lease_and_digest() -> None:
    def at(lease: str = "l1", digest: bytes = DIGEST, key: bytes = KEY) -> tuple[int, ...]:
        return draw(key, lease, digest, 64, 0.3)

    assert at() == at()
    assert len({at(), at(lease="l2"), at(digest=bytes(31) + b"1"), at(key=bytes(32))}) == 4


def test_a_vector_of_the_draw() -> None:
    assert drawn(trusted(10**6), audit_floor=0.3) == (3, 4, 5, 7, 12)


def test_a_higher_probability_only_adds() -> None:
    few, many = (set(drawn(trusted(10**6), size=4096, audit_floor=p)) for p in (0.02, 0.2))
    assert few < many
    assert drawn(trusted(10**6), size=50, audit_floor=1.0) == tuple(range(50))
    assert drawn(trusted(10**6), size=50, audit_floor=0.0, audit_scale=0.0, audit_least=0.0) == ()


def test_the_budget_caps_the_probability_but_never_below_the_least() -> None:
    assert affordable(0.01, audit_s=0.5, generate_s=1.0) == 0.02
    assert affordable(0.01, audit_s=0.0, generate_s=1.0) == affordable(0.01, audit_s=1.0, generate_s=0.0) == 1
    found = [audit_probability(trusted(10), SETTINGS, afford) for afford in (1.0, 0.05, 0.004, 0.0)]
    assert found == [0.1, 0.05, 0.004, SETTINGS.audit_least]
    assert audit_probability(NodeRecord(), SETTINGS, 0.0) == 1


def test_what_was_replayed_beyond_the_budget_is_made_up_for_by_drawing_less() -> None:
    """Looks at work that no step trains on are not drawn within the budget; over a long life all together are."""
    rng, record, replayed, tokens = np.random.default_rng(1), trusted(10**6), 0, 0
    for number in range(20_000):
        p = audit_probability(record, SETTINGS, 0.01)
        looks = 1 if number % 25 == 0 else 0  # 0.5 % of all
        size = int(rng.binomial(8, p)) + looks
        record = submitted(record, 8 * 20)
        if size:
            record, outcome = fold(record, [clean(20)] * size, SETTINGS, was_trusted=True)
            assert outcome.kind == "ok"
        replayed, tokens = replayed + 20 * size, tokens + 8 * 20
    assert record.trusted_tokens == tokens
    assert record.audited_trusted_tokens == replayed
    assert 0.009 < replayed / tokens < 0.0105
    new = submitted(NodeRecord(), 100)
    assert (new.submissions, new.trusted_tokens) == (1, 0), "what is on probation is no trusted work"


def test_the_brake_needs_several_nodes_and_nearly_all_of_the_work() -> None:
    def opened(*weights: int) -> bool:
        return is_breaker_due(Poll(*weights), 0.9, 3)

    assert not opened(2, 100, 0, 0), "two nodes"
    assert opened(3, 100, 0, 0)
    assert opened(3, 91, 4, 5)
    assert not opened(30, 30, 0, 5), "honest nodes that nobody has looked at yet"
    assert not opened(30, 30, 5, 0)
    assert opened(3), "nobody did any work that counts"


def test_a_step_is_in_doubt_until_others_pass() -> None:
    def doubt(*weights: int) -> bool:
        return is_doubtful(Poll(*weights), 0.9, 3)

    assert not doubt(2, 100, 0, 0)
    assert doubt(3, 3, 0, 20)
    assert doubt(3, 3, 2, 18)
    assert not doubt(3, 3, 3, 17)
    assert not doubt(30, 30, 4, 1)


def test_the_share_that_is_drawn() -> None:
    count = sum(len(drawn(trusted(10**6), lease=f"l{i}")) for i in range(500))
    assert count / 8000 == pytest.approx(0.01, abs=0.004)


def test_the_probability_of_being_caught() -> None:
    assert probability_caught(1, 1.0, 0.02, 16, 1.0) == pytest.approx(1 - 0.98**16)
    assert probability_caught(100, 0.1, 0.02, 16, 0.9) == pytest.approx(1 - (1 - 0.0018) ** 1600)
    assert probability_caught(10, 1e-12, 0.02, 16, 1.0) == pytest.approx(10 * 16 * 2e-14)
    assert probability_caught(1, 1.0, 1.0, 1, 1.0) == 1
    assert probability_caught(0, 1.0, 1.0, 16, 1.0) == probability_caught(9, 0.0, 1.0, 16, 1.0) == 0


def test_the_closed_form_agrees_with_the_draw() -> None:
    """A node that cheats on the first quarter of every submission, found within three of them."""
    runs = 300
    found = sum(
        any(index < 4 for n in range(3) for index in drawn(trusted(10**6), lease=f"{run}-{n}")) for run in range(runs)
    )
    assert found / runs == pytest.approx(probability_caught(3, 0.25, 0.01, 16, 1.0), abs=0.07)
