"""Where to fetch a shard: relays by success × bandwidth with a little exploration, the origin last. Pure."""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

EXPLORE = 0.1
"""Share of choices that ignore what is known, so that a relay that got better is noticed."""
UNKNOWN_BYTES_PER_S = 1e9
"""What a relay is taken for until it was tried: better than any, so that each is tried once."""
MEMORY = 0.7
"""Weight of the past in the running averages."""


@dataclass(frozen=True, slots=True)
class Score:
    """What one source has shown so far."""

    success: float = 1.0
    """Running share of fetches that ended with the right bytes."""
    bytes_per_s: float = UNKNOWN_BYTES_PER_S

    @property
    def value(self) -> float:
        """Bytes per second that may be expected."""
        return self.success * self.bytes_per_s


def succeeded(score: Score, size_bytes: int, took_s: float) -> Score:
    """The score after a fetch that worked."""
    speed = size_bytes / max(took_s, 1e-6)
    known = speed if score.bytes_per_s == UNKNOWN_BYTES_PER_S else MEMORY * score.bytes_per_s + (1 - MEMORY) * speed
    return Score(MEMORY * score.success + (1 - MEMORY), known)


def failed(score: Score) -> Score:
    """The score after a fetch that failed, or brought wrong bytes."""
    return Score(MEMORY * score.success, score.bytes_per_s)


def order(relays: Iterable[str], scores: Mapping[str, Score], rng: random.Random) -> list[str]:
    """The relays in the order in which to try them."""
    ranked = list(relays)
    rng.shuffle(ranked)
    if rng.random() >= EXPLORE:
        ranked.sort(key=lambda url: -scores.get(url, Score()).value)
    return ranked
