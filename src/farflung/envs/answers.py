"""Find the final answer in a reply and compare it. Every rule picks one answer, so listing many pays nothing."""

import re
from fractions import Fraction
from typing import Literal

Place = Literal["last_number", "tag", "exact"]
"""Where the answer stands: the last number of the reply; behind its last tag, else its last line; the whole reply."""

NUMBER = re.compile(r"(?:(?<![\w)])[-+−])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")
TAG = re.compile(r"answer:", re.IGNORECASE)
CHOICE = re.compile(r"\b[A-H]\b")
MAX_NUMBER_CHARS = 64
"""A longer number is none: reading a million digits takes time quadratic in their number."""


def find(reply: str, place: Place) -> str:
    """The answer at that place of the reply, or "" if there is none."""
    if place == "last_number":
        return last_number(reply)
    return tidy(reply) if place == "exact" else tagged(reply)


def last_number(reply: str) -> str:
    """The last number in the reply, such as `-1,234.5`; the minus of `7-5` belongs to the sum, not to the 5."""
    found = ""
    for match in NUMBER.finditer(reply):
        found = match.group()
    return found


def tagged(reply: str) -> str:
    """What the last `<answer>…</answer>` holds, else the rest of the line of the last `Answer:`, else the last line."""
    _, tag, rest = reply.rpartition("<answer>")
    if tag:
        return tidy(rest.partition("</answer>")[0])
    after = [match.end() for match in TAG.finditer(reply)]
    if after:
        return tidy(reply[after[-1] :].strip().partition("\n")[0])
    return tidy(reply.strip().rpartition("\n")[2])


def choice(reply: str) -> str:
    """The one choice A–H that the tagged answer names; "" when it names none, or hedges."""
    letters = set(CHOICE.findall(tagged(reply)))
    return letters.pop() if len(letters) == 1 else ""


def tidy(text: str) -> str:
    """Without the marks that models put around an answer: blanks, emphasis, quotes of code, a full stop."""
    return text.strip(" \t\r\n*`$").removesuffix(".").strip(" \t\r\n*`$")


def value(text: str) -> Fraction | None:
    """The number that the whole text is, exactly, or None."""
    if len(text) > MAX_NUMBER_CHARS or not NUMBER.fullmatch(text):
        return None
    return Fraction(text.replace(",", "").replace("−", "-"))


def same(found: str, right: str) -> bool:
    """Whether two answers are equal as numbers, or as text whatever its case and spacing."""
    left, expected = value(tidy(found)), value(tidy(right))
    if left is not None and expected is not None:
        return left == expected
    return tidy(found).casefold().split() == tidy(right).casefold().split() != []


def digits_right(found: str, right: str) -> float:
    """Share of the sign and the digits of two whole numbers that agree, place by place from the units; else 0."""
    left, expected = value(tidy(found)), value(tidy(right))
    if left is None or expected is None or left.denominator != 1 or expected.denominator != 1:
        return 0.0
    pair = [str(abs(number.numerator))[::-1] for number in (left, expected)]
    agree = sum(one == other for one, other in zip(*pair, strict=False)) + (left * expected >= 0)
    return agree / (max(map(len, pair)) + 1)
