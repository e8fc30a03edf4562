"""Token buckets: what a sender may ask in a while, and that a flood of senders takes no memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farflung.net.rate_limit import Buckets, sender_of
from farflung.protocol.errors import Busy


def let_in(buckets: Buckets, sender: str, times: list[float]) -> int:
    """How many requests at these times pass."""
    passed = 0
    for now in times:
        try:
            buckets.take(sender, now)
        except Busy:
            continue
        passed += 1
    return passed


@given(st.floats(0.1, 50), st.floats(1, 30), st.lists(st.floats(0, 5), min_size=1, max_size=60))
def test_never_more_than_a_burst_and_the_rate_times_the_time(per_s: float, burst: float, pauses: list[float]) -> None:
    times = [sum(pauses[: n + 1]) for n in range(len(pauses))]
    most = burst + per_s * (times[-1] - times[0])
    assert let_in(Buckets(per_s, burst, what="node"), "n1", times) <= most + 1e-6


def test_who_waits_as_told_is_let_in() -> None:
    buckets = Buckets(2.0, 3.0, what="node")
    assert let_in(buckets, "n1", [0.0] * 5) == 3
    with pytest.raises(Busy, match=r"node n1 asks more than 2 times a second") as told:
        buckets.take("n1", 0.1)
    buckets.take("n1", 0.1 + told.value.retry_after_s)
    assert let_in(buckets, "n2", [0.2]) == 1, "another sender has a bucket of its own"


def test_a_rate_of_nothing_is_no_limit() -> None:
    assert let_in(Buckets(0.0, 1.0, what="node"), "n1", [0.0] * 100) == 100


def test_a_flood_of_senders_is_forgotten() -> None:
    buckets = Buckets(1.0, 1.0, what="address", most=10)
    for number in range(1000):
        buckets.take(f"10.0.0.{number}", 0.0)
    assert len(buckets._left) == 10


@pytest.mark.parametrize(
    ("host", "sender"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("a socket", "a socket"),
    ],
)
def test_what_counts_as_one_address(host: str, sender: str) -> None:
    assert sender_of(host) == sender
