"""The tables of lifecycles and the one check over them."""

from itertools import pairwise

import pytest

from farflung.protocol import states
from farflung.protocol.errors import IllegalTransition

TERMINAL = {noun: {one for one, after in table.items() if not after} for noun, table in states.LIFECYCLES.items()}
"""The statuses of each noun that nothing follows."""


@pytest.mark.parametrize("noun", states.LIFECYCLES)
def test_every_status_is_known_and_reachable(noun: str) -> None:
    table = states.LIFECYCLES[noun]
    reached, queue = set(), [states.first(noun)]
    while queue:
        status = queue.pop()
        if status not in reached:
            reached.add(status)
            queue.extend(table[status])
    assert reached == set(states.statuses(noun))


@pytest.mark.parametrize("noun", [noun for noun, ends in TERMINAL.items() if ends])
def test_every_life_can_end_wherever_it_is(noun: str) -> None:
    table = states.LIFECYCLES[noun]
    ending = set(TERMINAL[noun])
    while more := {status for status, after in table.items() if set(after) & ending} - ending:
        ending |= more
    assert ending == set(table)


def test_terminal_statuses() -> None:
    assert TERMINAL["rollout"] == {"expired", "rejected", "void", "dropped", "trained"}
    assert TERMINAL["lease"] == {"submitted", "returned", "expired", "void"}
    assert TERMINAL["group"] == {"trained", "dropped"}
    assert TERMINAL["step"] == {"committed"}
    assert TERMINAL["node"] == {"ejected"}
    assert TERMINAL["audit"] == {"done", "cancelled"}
    assert TERMINAL["rollout"] >= states.REOPENING


def test_the_happy_lives() -> None:
    lives = {
        "rollout": ("leased", "held", "received", "accepted", "batched", "trained"),
        "lease": ("open", "submitted"),
        "group": ("open", "complete", "open", "complete", "batched", "trained"),
        "step": ("open", "committed"),
        "node": ("probation", "trusted", "probation", "quarantined", "ejected"),
        "audit": ("open", "claimed", "open", "claimed", "done"),
    }
    for noun, life in lives.items():
        assert life[0] == states.first(noun)
        for before, after in pairwise(life):
            assert states.check(noun, "x", before, after) == after


def test_held_text_is_never_scored_before_its_replay() -> None:
    """From `held` straight to `accepted` goes only what was scored before it came under suspicion."""
    assert not states.is_legal("rollout", "leased", "accepted")
    assert not states.is_legal("rollout", "held", "batched")
    assert states.is_legal("rollout", "accepted", "held")


def test_a_batch_ends_trained_or_goes_back_to_be_audited() -> None:
    assert states.LIFECYCLES["rollout"]["batched"] == ("trained", "held", "accepted")
    assert states.LIFECYCLES["group"]["batched"] == ("trained", "open")


def test_the_message_tells_noun_id_statuses_choices_and_story() -> None:
    with pytest.raises(IllegalTransition) as caught:
        states.check("rollout", "r7", "held", "batched", ["leased to n1", "held for audit a2"])
    assert str(caught.value) == (
        "rollout r7 cannot go from 'held' to 'batched'; from 'held' it may go to: received, accepted, rejected, void, "
        "dropped; its story: leased to n1 → held for audit a2"
    )


def test_the_message_of_a_final_and_of_an_unknown_status() -> None:
    with pytest.raises(IllegalTransition, match="'trained' is final; its story: no events"):
        states.check("group", "g1", "trained", "open")
    with pytest.raises(IllegalTransition, match="'lost' is no status of a lease, which has: open, submitted"):
        states.check("lease", "l1", "lost", "open")


def test_staying_is_not_a_change() -> None:
    assert not any(states.is_legal(n, s, s) for n in states.LIFECYCLES for s in states.statuses(n))
