"""How long a lease lasts: by the node's measured speed, and what counts as progress."""

from types import SimpleNamespace

import pytest

from farflung.config import Config
from farflung.protocol.messages import Heartbeat
from farflung.tasks.deadline import first_s, has_gone_on, longest_s

LONG = Config.model_validate({"generate": {"max_new_tokens": 32_768}})
"""A lease may last 13,107.2 s."""


@pytest.mark.parametrize(
    ("tokens_per_s", "lapsed", "life_s"),
    [(0.0, 0, 300), (5_000.0, 0, 300), (100.0, 0, 5_242.88), (10.0, 0, 13_107.2), (10.0, 2, 3_276.8), (10.0, 40, 300)],
)
def test_the_first_life_follows_from_budget_and_measured_speed(tokens_per_s, lapsed, life_s) -> None:
    assert first_s(LONG, 16 * 32_768, tokens_per_s, lapsed) == pytest.approx(life_s)


def test_each_lease_that_came_to_nothing_halves_the_longest_life_down_to_that_without_progress() -> None:
    lives = [longest_s(LONG, lapsed) for lapsed in range(8)]
    assert lives[:3] == pytest.approx([13_107.2, 6_553.6, 3_276.8])
    assert lives[6:] == [300, 300]


@pytest.mark.parametrize(
    ("before", "after", "is_so"),
    [
        ({"made": 3}, {"made": 4}, True),
        ({"made": 4}, {"made": 4}, False),
        ({"made": 4}, {"made": 3}, False),
        ({"fetched_bytes": 7}, {"fetched_bytes": 8}, True),
        ({"made": 4, "fetched_bytes": 7}, {"made": 4, "fetched_bytes": 8}, False),
    ],
    ids=["tokens", "none", "fewer", "weights", "weights ahead of a hung engine"],
)
def test_progress_is_tokens_or_weights_before_the_first_of_them(before, after, is_so) -> None:
    lease = SimpleNamespace(**({"made": 0, "fetched_bytes": 0} | before))
    assert has_gone_on(lease, Heartbeat(lease="l1", **after)) is is_so


def test_a_liar_that_asks_again_at_once_holds_little_in_the_long_run() -> None:
    """Lapsed leases count for twice the longest life; those of that time also make a pause (`tasks/lease.py`)."""
    now, opened, held = 0.0, list[float](), list[float]()
    while now < 40 * LONG.deadline_s:
        lately = [at for at in opened if at > now - 2 * LONG.deadline_s]
        pause_s = lately[-1] + min(2.0 ** (len(lately) - 1), LONG.deadline_s) - now if lately else 0.0
        now += max(0.0, pause_s)
        life_s = longest_s(LONG, sum(at > now - 2 * LONG.deadline_s for at in opened))
        opened.append(now)
        held.append(life_s)
        now += life_s
    late = held[len(held) // 2 :]
    assert sum(held) / now < 0.2
    assert sum(late) / len(late) < 1.2 * LONG.lease.lease_s
