"""One key at work in two places: both are told; who is started again is not."""

import pytest

from farflung.coordinator.twins import MOST_NODES, TOLD_EVERY_S, Twins
from farflung.protocol.errors import Conflict
from farflung.protocol.messages import Heartbeat


def told(twins: Twins, *beats: tuple[float, float], phase: str = "working", node: str = "n1") -> list[float]:
    """The starts of the processes that were refused, each beat being a start and a time."""
    found = []
    for started_at, at in beats:
        try:
            twins.check(node, Heartbeat(started_at=started_at, phase=phase), at)
        except Conflict:
            found.append(started_at)
    return found


def test_two_processes_that_beat_in_turn_are_both_told_and_not_at_each_beat() -> None:
    beats = [(float(1 + number % 2), 5.0 * number) for number in range(12)]
    assert told(Twins(), *beats) == [1.0, 2.0]
    long = [(float(1 + number % 2), 5.0 * number) for number in range(int(3 * TOLD_EVERY_S / 5))]
    assert 4 <= len(told(Twins(), *long)) <= 6


@pytest.mark.parametrize(
    "starts", [(1, 1, 1), (1, 2, 2), (1, 2, 3, 4), (1, 1, 2, 2, 3)], ids=["one", "again", "and again", "often"]
)
def test_who_is_started_again_is_not_told(starts: tuple[int, ...]) -> None:
    assert told(Twins(), *((float(start), 5.0 * number) for number, start in enumerate(starts))) == []


def test_a_late_goodbye_is_no_twin_and_other_nodes_are_others() -> None:
    twins = Twins()
    assert told(twins, (1.0, 0.0), (2.0, 5.0)) == []
    assert told(twins, (1.0, 6.0), phase="gone") == []
    assert told(twins, (2.0, 7.0)) == []
    assert told(twins, (1.0, 8.0), node="n2") == []


def test_it_is_forgotten_once_one_has_left() -> None:
    twins = Twins()
    assert told(twins, (1.0, 0.0), (2.0, 5.0), (1.0, 10.0)) == [1.0]
    assert told(twins, *((1.0, 1000.0 + number) for number in range(9))) == []


def test_a_flood_of_keys_takes_no_more_memory() -> None:
    twins = Twins()
    for number in range(MOST_NODES + 5):
        told(twins, (1.0, 0.0), node=f"n{number}")
    assert len(twins._lives) == MOST_NODES


def test_processes_on_devices_of_their_own_are_no_twins_but_two_on_one_are() -> None:
    twins, refused = Twins(), []
    for number in range(12):
        start, at = 1 + number % 3, 5.0 * number
        try:
            twins.check("n1", Heartbeat(started_at=float(start), phase="working", device=min(start, 2)), at)
        except Conflict:
            refused.append(start)
    assert set(refused) == {2, 3}
