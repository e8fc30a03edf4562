"""Possession: a digest over a few slices of the tensors in an engine, so that a missed weight update is loud at once.

The step's probe key chooses the slices; the trainer sends their bytes with its commit, so the coordinator needs neither
tensors nor torch to check an answer. It proves no honesty: a node may hold the right weights and use others.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from farflung.protocol.seeds import derive

SLICES: Final = 64
VALUES: Final = 128
"""8,192 values: a step that changes 1 in 300 of them goes unnoticed with probability e^-27."""


class Slice(NamedTuple):
    """Values start … stop − 1 of a tensor, counted in row-major order."""

    name: str
    start: int
    stop: int


def slices(shapes: Iterable[tuple[str, Sequence[int]]], key: bytes) -> list[Slice]:
    """The slices that a probe key chooses, every value of the model as likely to be in one as any other.

    `shapes` are name and shape of every tensor, in the manifest's order.
    """
    sizes = [(name, math.prod(shape)) for name, shape in shapes]
    total = sum(size for _, size in sizes)
    return [_slice(sizes, int.from_bytes(derive(key, "probe", i)[:8], "big") % total) for i in range(SLICES)]


def _slice(sizes: Sequence[tuple[str, int]], place: int) -> Slice:
    for name, size in sizes:
        if place < size:
            return Slice(name, place, min(place + VALUES, size))
        place -= size
    raise AssertionError("the place lies within the sizes' sum")


def answer(nonce: str, data: bytes) -> str:
    """SHA-256 over a nonce and the slices' bytes, in hex: no other node's answer fits."""
    return hashlib.sha256(bytes.fromhex(nonce) + data).hexdigest()
