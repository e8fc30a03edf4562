"""Sums worked digit by digit: the task of the demo, small enough for a model of under a million parameters.

    prompt       123+989=
    completion   39:12 281:11 191:11 =1112

A column is its digits and the carry if there is one, then what they add up to; the last word is the answer.
A model that forgets to carry writes `39:12 28:10 19:10 =1002`, and one sees it at a glance.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from farflung.envs.base import Score, Split, Task
from farflung.envs.split import shuffled, split_of
from farflung.protocol.errors import ConfigError

COLUMN = re.compile(r"[0-9]{2,10}:[0-9]{1,2}")
SHOWN_ANSWER_CHARS = 40


class Sums:
    """Add `terms` numbers of `digits` digits; the reward is 1 when the final answer is right, else 0."""

    version = "1"

    def __init__(self, digits: int = 3, terms: int = 2) -> None:
        if not 1 <= digits <= 9:
            raise ConfigError(f"sums: digits = {digits}; give a number of digits from 1 to 9")
        if not 2 <= terms <= 9:
            raise ConfigError(f"sums: terms = {terms}; give a number of terms from 2 to 9")
        self.digits, self.terms = digits, terms
        self.spec: dict[str, Any] = {"digits": digits, "terms": terms}

    def tasks(self, split: Split) -> Iterator[Task]:
        """Yield every question of the split once, lazily; `a+b` and `b+a` are held out together."""
        lowest = 10 ** (self.digits - 1) if self.digits > 1 else 0
        span = 10**self.digits - lowest
        for index in shuffled(span**self.terms, f"sums/{self.digits}/{self.terms}"):
            terms = [lowest + index // span**place % span for place in range(self.terms)]
            if split_of("+".join(str(term) for term in sorted(terms))) == split:
                yield {"terms": terms}

    def prompt(self, task: Task) -> str:
        """The sum as plain text, such as `123+989=`."""
        return "+".join(str(term) for term in task["terms"]) + "="

    def score(self, task: Task, transcript: str) -> Score:
        """Reward 1 if what follows the only `=`, up to the end, is the sum digit for digit.

        Only one `=` is allowed, so a list of guesses earns nothing. The working earns nothing either: `columns`
        (share worked right) and `format` are for people to read.
        """
        working, _, answer = transcript.strip().partition("=")
        columns, right_columns = working.split(), worked(task["terms"]).partition("=")[0].split()
        has_format = len(columns) == len(right_columns) and all(COLUMN.fullmatch(column) for column in columns)
        right = sum(a == b for a, b in zip(columns, right_columns, strict=False))
        return Score(
            reward=float(answer == str(sum(task["terms"]))),
            parts={"format": float(has_format), "columns": right / len(right_columns)},
            answer=answer[:SHOWN_ANSWER_CHARS],
        )


def worked(terms: Sequence[int], keeps_carry: Callable[[], bool] = lambda: True) -> str:
    """The completion that works the sum from the units; a carry for which `keeps_carry()` is false is forgotten."""
    words: list[str] = []
    answer, carry = "", 0
    width = max(len(str(term)) for term in terms)
    for place in range(width):
        digits = [term // 10**place % 10 for term in terms]
        carry = carry if carry and keeps_carry() else 0
        total = sum(digits) + carry
        words.append("".join(map(str, digits)) + (str(carry) if carry else "") + f":{total}")
        carry, digit = divmod(total, 10)
        answer = str(total if place == width - 1 else digit) + answer
    return " ".join([*words, f"={answer}"])
