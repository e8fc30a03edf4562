"""The split into held-out and training questions, and their order: pure functions of a hash, one for all."""

import hashlib
from collections.abc import Iterator, Sequence

from farflung.envs.base import Split

EVAL_ONE_IN = 8
"""One question in so many is held out."""


def number_of(*parts: object) -> int:
    """A 64-bit number that depends on the parts and on nothing else (not on PYTHONHASHSEED)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def divided(questions: Sequence[str]) -> list[Split]:
    """The split of each of all the questions there are: as `split_of` says, but neither is left without any.

    Where all of a few questions fall into one split, the one with the lowest hash is held out, the others are not.
    """
    splits = [split_of(question) for question in questions]
    if len(set(questions)) < 2 or len(set(splits)) == 2:
        return splits
    held_out = min(questions, key=_hashed)
    return ["eval" if _hashed(question) == _hashed(held_out) else "train" for question in questions]


def _hashed(question: str) -> int:
    return number_of("split", " ".join(question.casefold().split()))


def split_of(question: str) -> Split:
    """The one split this question belongs to, whatever its case and spacing."""
    return "eval" if _hashed(question) % EVAL_ONE_IN == 0 else "train"


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
