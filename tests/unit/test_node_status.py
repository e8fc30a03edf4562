"""What the owner of a node is told: each verdict once, with what follows and what to do."""

import logging

import pytest

from farflung.protocol.messages import HeartbeatReply, Latest, Ruling
from farflung.protocol.node_status import NodeStatus, sentences

LATEST = Latest(status="running", step=3, manifest="")
SUBMISSION = "ab" * 32


def reply(status: str, *rulings: Ruling, clean: int = 0, needed: int = 64) -> HeartbeatReply:
    return HeartbeatReply(latest=LATEST, status=status, clean=clean, needed=needed, rulings=list(rulings))


def ruling(id: int, outcome: str, reason: str = "short") -> Ruling:
    return Ruling(id=id, outcome=outcome, submission=SUBMISSION, reason=reason, at=0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("outcome", ["void", "quarantine", "eject", "release"])
def test_a_verdict_says_what_happened_what_follows_and_what_to_do(outcome: str) -> None:
    told = sentences(ruling(1, outcome, "the reason"))
    assert "the reason" in told
    assert len(told.split("; ")) == 3
    if outcome in ("void", "quarantine"):
        assert SUBMISSION[:12] in told
        assert "farflung doctor" in told


def test_each_verdict_is_told_once_and_its_detail_when_it_comes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    status = NodeStatus()
    status.hear(reply("probation", clean=8))
    assert str(status) == "on probation, 8 of 64 clean rollouts"
    for _ in range(3):
        status.hear(reply("probation", ruling(7, "void"), needed=128))
    status.hear(reply("quarantined", ruling(7, "void", "12 of 96 tokens"), ruling(9, "quarantine"), needed=128))
    warned = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert len(warned) == 2
    assert "is void: short" in warned[0]
    assert "no work until a second opinion" in warned[1]
    assert str(status) == "in quarantine, waiting for a second opinion"
    why = [one.getMessage() for one in caplog.records if "12 of 96 tokens" in one.getMessage()]
    assert len(why) == 1
    assert not status.is_ejected
    status.hear(reply("ejected", ruling(11, "eject")))
    assert status.is_ejected


def test_a_node_that_comes_back_hears_the_last_word_alone(caplog: pytest.LogCaptureFixture) -> None:
    NodeStatus().hear(reply("probation", ruling(1, "void"), ruling(2, "void"), ruling(3, "release")))
    warned = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert len(warned) == 1
    assert "out of quarantine" in warned[0]


def test_roles_of_which_no_trust_is_kept_hear_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    NodeStatus().hear(reply("probation", needed=0))
    assert not caplog.records
