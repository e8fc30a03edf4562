"""Which questions are held out, and in what order the others come: pure functions of a hash, the same for every env."""

import hashlib
from collections.abc import Iterator

from farflung.envs.base import Split

EVAL_ONE_IN = 8
"""One question in so many is held out."""


def number_of(*parts: object) -> int:
    """A 64-bit number that depends on the parts and on nothing else (not on PYTHONHASHSEED)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def split_of(question: str) -> Split:
    """The one split this question belongs to, whatever its case and spacing."""
    return "eval" if number_of("split", " ".join(question.casefold().split())) % EVAL_ONE_IN == 0 else "train"


def shuffled(count: int, key: str) -> Iterator[int]:
    """Yield each of 0 … count-1 once, in an order set by `key`.

    Fisher–Yates over a dict: memory grows with what was taken, not with `count`, which may be 10^18.
    """
    moved: dict[int, int] = {}
    for place in range(count):
        other = place + number_of(key, place) % (count - place)
        drawn = moved.get(other, other)
        moved[other] = moved.pop(place, place)
        yield drawn
