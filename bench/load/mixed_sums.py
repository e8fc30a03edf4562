"""Sums of three kinds for a model that forgets to carry: those that it knows, those that it can learn, those too long.

A kind of `fit` is what `envs/sums.py` asks, with a carry. `easy` ones carry nothing, so the base model is nearly always
right; `hopeless` ones have six digits, more than fit within the run's budget of 32 tokens. Held out are fit ones alone.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from farflung.envs.base import Split, Task
from farflung.envs.sums import Sums

HOPELESS_DIGITS = 6


class MixedSums(Sums):
    """`shares` says how many of each kind come in turn, as `easy`, `fit`, `hopeless`."""

    def __init__(self, shares: tuple[int, int, int] = (1, 1, 1)) -> None:
        super().__init__()
        self.shares = tuple(shares)
        self.spec: dict[str, Any] = {"shares": list(shares)}

    def tasks(self, split: Split) -> Iterator[Task]:
        """Yield questions of each kind in turn."""
        whole = Sums(3).tasks
        kinds = (
            (task for task in whole(split) if not carries(task)),
            (task for task in whole(split) if carries(task)),
            Sums(HOPELESS_DIGITS).tasks(split),
        )
        shares = self.shares if split == "train" else (0, 1, 0)
        while True:
            for kind, share in zip(kinds, shares, strict=True):
                yield from itertools.islice(kind, share)


def carries(task: Task) -> bool:
    """Whether some column of a sum of two comes to ten or more before the last."""
    first, second = task["terms"]
    return any(first // 10**place % 10 + second // 10**place % 10 > 9 for place in range(2))
