"""How long a body may take: the rollouts of a long lease come over a slow line, a drip does not."""

from collections.abc import Iterable

from farflung.net.server import BODY_S, SLOWEST_BYTES_PER_S, later

LONG_LEASE_BYTES = 16 * 32_768 * 8
"""Sixteen rollouts of 32,768 tokens, each with its log-probability."""


def cut_off_at(parts: Iterable[tuple[float, int]]) -> float | None:
    """When a body is cut off whose parts come at these times; None if all came."""
    deadline = BODY_S
    for at, size in parts:
        if at > deadline:
            return deadline
        deadline = later(deadline, at, size)
    return None


def test_a_long_lease_comes_through_a_line_of_the_slowest_speed() -> None:
    seconds = int(LONG_LEASE_BYTES / SLOWEST_BYTES_PER_S) + BODY_S
    assert seconds > BODY_S
    size = int(LONG_LEASE_BYTES / seconds) + 1
    assert cut_off_at((float(at), size) for at in range(int(seconds))) is None


def test_a_drip_is_cut_off() -> None:
    assert cut_off_at((float(at), 1) for at in range(1000)) is not None
    assert cut_off_at((float(at), 1) for at in range(int(BODY_S))) is None


def test_a_fast_start_buys_no_idling() -> None:
    assert cut_off_at([(0.5, 100_000_000), (BODY_S + 1, 1)]) == BODY_S + 0.5
