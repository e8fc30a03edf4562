"""Sources of a shard: relays by success × bandwidth with a little exploration, the origin last. Pure."""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

EXPLORE = 0.1
"""Share of choices that ignore what is known, so that a relay that got better is noticed."""
UNKNOWN_BYTES_PER_S = 1e9
"""The speed that a relay is taken to have until it was tried: better than any, so that each is tried once."""
MEMORY = 0.7
"""Weight of the past in the running averages."""
LIES = 3
"""Wrong shards after which a relay is dropped for good. One may be the lie of its own upstream, passed on in flight."""
LEAST_SUCCESS = 0.35
"""Share of fetches that work below which a relay is left alone for AWAY_S: after three failures in a row."""
AWAY_S = 60.0


@dataclass(frozen=True, slots=True)
class Score:
    """One source's record so far."""

    success: float = 1.0
    """Running share of fetches that ended with the right bytes."""
    bytes_per_s: float = UNKNOWN_BYTES_PER_S
    lies: int = 0
    """Shards that came whole from it alone and were wrong."""
    failed_at: float = float("-inf")

    @property
    def value(self) -> float:
        """Bytes per second that may be expected."""
        return self.success * self.bytes_per_s

    def is_dropped(self, now: float) -> bool:
        """Whether this node does without it: for good once it lied LIES times, for a while when it fails."""
        return self.lies >= LIES or (self.success < LEAST_SUCCESS and now < self.failed_at + AWAY_S)


def succeeded(score: Score, size_bytes: int, took_s: float) -> Score:
    """The score after a fetch that worked."""
    speed = size_bytes / max(took_s, 1e-6)
    known = speed if score.bytes_per_s == UNKNOWN_BYTES_PER_S else MEMORY * score.bytes_per_s + (1 - MEMORY) * speed
    return replace(score, success=MEMORY * score.success + (1 - MEMORY), bytes_per_s=known)


def failed(score: Score, now: float, *, is_lie: bool = False) -> Score:
    """The score after a fetch that broke off or took too long, or that brought wrong bytes: a lie."""
    return replace(score, success=MEMORY * score.success, lies=score.lies + is_lie, failed_at=now)


def refused(score: Score) -> Score:
    """The score after an honest no: it has not got the shard, or too much to do. Others go first, it is not dropped."""
    return replace(score, success=MEMORY * score.success)


def ranked(
    relays: Iterable[str], scores: Mapping[str, Score], busy: Mapping[str, int], now: float, rng: random.Random
) -> list[str]:
    """The relays in the order in which to try them; those that are dropped are left out.

    `busy` says how many shards are coming from each already. They share its speed, so shards spread over the relays.
    """
    known = {url: scores.get(url, Score()) for url in relays}
    ranked = [url for url, score in known.items() if not score.is_dropped(now)]
    rng.shuffle(ranked)
    explores = rng.random() < EXPLORE

    def expected(url: str) -> float:
        return (1.0 if explores else known[url].value) / (1 + busy.get(url, 0))

    return sorted(ranked, key=expected, reverse=True)
