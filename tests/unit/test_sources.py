"""Which relay is asked first: success times bandwidth, shared by what is under way, with a little exploration."""

import random
from collections import Counter

from farflung.weights import sources
from farflung.weights.sources import Score, failed, ranked, refused, succeeded

FAST, SLOW = Score(1.0, 50e6), Score(1.0, 5e6)


def first(scores: dict[str, Score], busy: dict[str, int] | None = None, now: float = 0.0) -> Counter[str]:
    """How often each relay comes first in a thousand draws."""
    drawn = (ranked(scores, scores, busy or {}, now, random.Random(seed)) for seed in range(1000))
    return Counter(found[0] if found else "" for found in drawn)


def test_the_faster_relay_comes_first_and_the_other_is_tried_now_and_then() -> None:
    found = first({"fast": FAST, "slow": SLOW})
    assert found["fast"] > 900
    assert 20 < found["slow"] < 100


def test_the_same_draw_gives_the_same_order() -> None:
    scores = {name: Score(1.0, speed) for name, speed in (("a", 1e6), ("b", 2e6), ("c", 3e6))}
    assert ranked(scores, scores, {}, 0.0, random.Random(3)) == ranked(scores, scores, {}, 0.0, random.Random(3))


def test_shards_spread_over_relays_that_share_their_speed() -> None:
    scores = dict.fromkeys("abcd", FAST)
    busy: Counter[str] = Counter()
    for _ in range(8):
        busy[ranked(scores, scores, busy, 0.0, random.Random(1))[0]] += 1
    assert busy == dict.fromkeys("abcd", 2)


def test_an_untried_relay_comes_before_known_ones() -> None:
    found = ranked(["known", "new"], {"known": FAST}, {}, 0.0, random.Random(1))
    assert found == ["new", "known"]


def test_a_relay_that_lies_again_and_again_is_dropped_for_good() -> None:
    score = FAST
    for _ in range(sources.LIES):
        assert not score.is_dropped(1e9)
        score = succeeded(failed(score, 0.0, is_lie=True), 1_000_000, 0.1)
    assert first({"liar": score}, now=1e9)[""] == 1000


def test_a_relay_that_stalls_is_left_alone_for_a_while() -> None:
    score = FAST
    for _ in range(3):
        score = failed(score, 100.0)
    assert score.is_dropped(100.0 + sources.AWAY_S - 1)
    assert not score.is_dropped(100.0 + sources.AWAY_S)


def test_a_relay_that_says_no_goes_last_and_is_not_dropped() -> None:
    score = FAST
    for _ in range(20):
        score = refused(score)
    assert not score.is_dropped(0.0)
    assert first({"no": score, "slow": SLOW})["slow"] > 900
