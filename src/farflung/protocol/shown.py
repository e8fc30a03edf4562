"""Text of strangers as people see it: characters that a terminal, browser or log obeys are written out. Pure.

Every place that shows text goes through here: pages, terminal, logs, error sentences. Markup is the other half, which
each medium has its own of: Jinja escapes HTML, `farflung.launch.terminal` takes no rich markup, logs have none.
"""

import re

OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u0600-\u0605\u061c\u06dd\u070f\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)
"""Controls (C0 but for tab and line feed, C1), directions, joiners, tags, lone surrogates."""
_BREAKS = re.compile("[\t\n]")


def visible(text: str) -> str:
    """The text with each of these characters as its escape, such as `\\x1b`; tabs and line feeds stay."""
    return OBEYED.sub(_escape, text)


def one_line(text: str) -> str:
    """The same without tabs and line feeds, which would make a second line of a log or message."""
    return _BREAKS.sub(_escape, visible(text))


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
