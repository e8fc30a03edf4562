"""Ids, numbers and cursors in a visitor's request: malformed ones are refused before the database sees them. Pure.

Refused, because a database takes less than Python does: PostgreSQL no NUL and no number beyond its column's.
"""

import math
import re

from farflung.protocol.errors import Malformed, NotFound

_ID = re.compile(r"[A-Za-z0-9_.-]{1,80}")
STEP, ENTRY = 2**31 - 1, 2**53 - 1
"""The largest step that its column holds, and the largest ledger entry that a browser can count to."""


def an_id(text: str, what: str) -> str:
    """Text that can be an id. Raises NotFound."""
    if not _ID.fullmatch(text):
        raise NotFound(f"{text[:80]!r} is no {what}: those have 1 to 80 letters, digits, dots, dashes and underscores")
    return text


def number(text: str, what: str, default: int, *, most: int) -> int:
    """A whole number from 0 to `most`; the default for no text. Raises Malformed."""
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20) or int(text) > most:
        raise Malformed(f"{text[:80]!r} is no {what}: those are numbers from 0 to {most}")
    return int(text)


def cursor(text: str) -> tuple[float, str] | None:
    """`TIME~ROLLOUT`, as links to the pages beside one have it; None for no text. Raises Malformed."""
    if not text:
        return None
    at, _, rollout = text[:200].partition("~")
    try:
        moment = float(at)
    except ValueError:
        moment = math.nan
    if not math.isfinite(moment) or not _ID.fullmatch(rollout):
        raise Malformed(f"{text[:80]!r} is no place in the list of rollouts: follow the links at its end")
    return moment, rollout
