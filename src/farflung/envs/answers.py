"""Find the final answer in a reply and compare it. Every rule picks one answer, so listing many pays nothing.

Only the text behind the last `</think>` counts, and of it the answer that the last mark names: `Answer:`,
`<answer>…</answer>`, `\\boxed{…}` or `#### …`. A reply that stops within a thought has no answer.
All is linear in the length of the reply: replies are strangers' text.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from operator import attrgetter
from typing import Literal

from farflung.envs import number_text
from farflung.envs.number_text import Number, words

Place = Literal["last_number", "tag", "exact"]
"""Where the answer stands: the number that the reply ends on; behind its last mark, else its last line; all of it."""

MAX_FOLDED_CHARS = 4_096
"""A longer text is compared without Unicode's normal forms, which cost time quadratic in a run of accents."""
MAX_LINES = 500
"""So many lines or sentences are searched for a number, from the end of a reply without a mark."""
WORDS_ALONE = re.compile(r"[\x00-\x2f\x3a-\x5b\x5d-\x7f]*")
"""A line in which nothing can be a number written in digits, nor a formula."""
THOUGHT_ENDS = re.compile(r"</(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
THOUGHT_BEGINS = re.compile(r"<(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
REPLY_ENDS = re.compile(
    r"<\|(?:im_end|endoftext|eot_id|end|end_of_text|eos)\|>|</s>|<end_of_turn>|<eos>|\n[ \t]*(?:Human|User):"
)
MARK = re.compile(
    r"<answer>|\\boxed[ ]?\{|^[ \t]*####[ \t]*(?=[^\w\n]{0,4}\d)"
    r"|(?<![^\W_])answers?(?: is)?(?: \([^()\n]{1,40}\))?[ ]?[*_]{0,3}[ ]?[:：][*_]{0,3}"
    r"|^[#*_ \t]{0,8}(?:the )?(?:final |correct )?answer[*_ \t]{0,8}$",
    re.IGNORECASE | re.MULTILINE,
)
ANSWER_IS = re.compile(r"\banswer (?:is|was|=|would be|must be)(?: that)?\b:?", re.IGNORECASE)
LISTED = re.compile(r"[\s$*_.,;|/&()\[\]]*(?:or|and)?[\s$*_(]*", re.IGNORECASE)
SENTENCES = re.compile(
    r"(?:\n|(?<=[.!?])[ \t])\s*+(?!(?:or|and|maybe|perhaps|possibly|alternatively|it (?:could|may|might))\b)",
    re.IGNORECASE,
)
ENUMERATION = re.compile(r"^[ \t]*\d{1,2}[.)][ \t]+(?=\S)", re.MULTILINE)
DOUBTS = words("""
    or either maybe perhaps possibly might may could wait actually versus vs alternatively instead
    rather between correction sorry wrong
""")
REASONS = words("because since as from via using given")
JOINS = words("and to through then by until plus")
WRAPPERS = (
    *(("**", "**"), ("__", "__"), ("*", "*"), ("_", "_"), ("`", "`"), ("$$", "$$"), ("$", "$"), ("\\(", "\\)")),
    *(('"', '"'), ("“", "”"), ("„", "“"), ("'", "'"), ("‘", "’"), ("«", "»"), ("\\[", "\\]")),
    *(
        ("\\text{", "}"),
        ("\\textbf{", "}"),
        ("\\mathrm{", "}"),
        ("\\mathbf{", "}"),
        ("\\boxed{", "}"),
        ("\\textit{", "}"),
    ),
)
QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "„": '"', "\u00a0": " "})
EQUALS = words("is are equals equal was were makes make gives give leaves becomes totals total")
MAX_WRAPPERS = 8
AS_WRITTEN = re.compile(r"[-+]?(?:0\d|\d+,\d{1,2}$)")
"""Compared as text: the zero of 007 means something, and 1,2 may be two numbers."""
BLANKS = " \t\r.,;!?"
NOTHING = frozenset({"none", "nothing", "zero", "nil", "null"})

REASON = re.compile(r"\b(?:because|since|as|given|rather than|instead of|not)\b", re.IGNORECASE)
LABEL = re.compile(
    r"[\s\"'(\[]*([A-Za-z])(?:[\s\"')\]]*(?:$|[.):!](?=\s|$)|\s?[-,;](?=\s))|[)\]](?=\s)|"
    r"(?=\s+(?:because|since|as|is (?:the )?(?:correct|right|true|best|answer))\b))"
)
NAMED = re.compile(
    r"(?i:\b(?:so|thus|therefore|hence|is|it's|options?|choices?|letters?|answers?|say|choose|pick|select|be|with|think)"
    r"(?=[\s:,])|[=:>→])[\s:,]?(?i: ?(?:it is|it's|the|option|choice|letter|answer))*[\s\"'(]*([A-Z])"
    r"(?=[\s\"')]*(?:$|[.,;!:]|\s(?:is|because|since|as|or|and)\b))"
)
BRACKETED = re.compile(r"[(\[]([A-Z])[)\]]")
ANOTHER = re.compile(
    r"(?i:\b(?:or|and|no|wait|maybe|perhaps|possibly|alternatively|versus|vs|to|actually|rather)\b|[,/&|;])[\s,\"'(\[]*([A-Z])(?![\w'])|[.!?]\s+([A-Z])\sis\b"
)


@dataclass(frozen=True)
class Marked:
    """A mark's answer; where in the reply the mark starts, and where its answer begins and ends."""

    text: str
    start: int
    begin: int
    end: int


def find(reply: str, place: Place) -> str:
    """The answer at that place of the reply, or "" if there is none."""
    if place == "last_number":
        return last_number(reply)
    return tidy(spoken(reply)) if place == "exact" else tagged(reply)


def spoken(reply: str) -> str:
    """The reply without its thoughts and without what follows its end; "" if it stops in a thought."""
    ends = [match.end() for match in THOUGHT_ENDS.finditer(reply)]
    said = reply[ends[-1] :] if ends else reply
    if THOUGHT_BEGINS.search(said):
        return ""
    end = REPLY_ENDS.search(said)
    return said[: end.start()] if end else said


def marked(said: str) -> str | None:
    """The last mark's answer; "" if it names two answers side by side or is cut off, None without a mark."""
    last: list[re.Match[str]] = []
    for match in MARK.finditer(said):
        last = [*last[-1:], match]
    if not last:
        return None
    found = [content(said, match) for match in last]
    if None in found[-1:]:
        return ""
    *before, final = [one for one in found if one is not None]
    return "" if before and are_rivals(said, before[0], final) else final.text


def is_marked(text: str) -> bool:
    """Whether a mark names the text's answer."""
    return MARK.search(text) is not None


def content(said: str, mark: re.Match[str]) -> Marked | None:
    """One mark's answer; None for a box that does not close."""
    sign, start = mark[0].lower(), mark.end()
    if sign == "<answer>":
        end = re.compile("</answer>", re.IGNORECASE).search(said, start)
        return Marked(said[start : end.start()], mark.start(), start, end.end()) if end else first_line(said, mark)
    if sign.startswith("\\boxed"):
        depth = 1
        for brace in re.compile(r"[{}]").finditer(said, start):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                return Marked(said[start : brace.start()], mark.start(), start, brace.end())
        return None
    return first_line(said, mark)


def first_line(said: str, mark: re.Match[str]) -> Marked:
    """The rest of the mark's line, or the first line behind it that is not blank."""
    blank = re.compile(r"\s*").match(said, mark.end())
    start = blank.end() if blank else mark.end()
    line_end = said.find("\n", start)
    end = line_end if line_end >= 0 else len(said)
    text = said[start:end].strip()
    opening = re.search(r"(\*\*|__|\*|_)[^*_\n]{0,30}$", said[max(0, mark.start() - 40) : mark.start()])
    if opening and text.endswith(opening[1]) and text.count(opening[1]) == 1:
        text = text.removesuffix(opening[1])
    return Marked(text, mark.start(), start, end)


def are_rivals(said: str, one: Marked, other: Marked) -> bool:
    """Whether two marks name different answers side by side: `\\boxed{41} or \\boxed{42}`."""
    if one.end > other.start:  # one in the other, or both in one line
        inside = said[one.begin : other.start].rstrip(" $*_(")
        return inside.endswith((" or", " and", ",", ";", "/", "|")) or number_text.whole(inside.rstrip(".")) is not None
    joint = said[one.end : other.start]
    is_line = one.end < len(said) and said[one.end] == "\n" and not said[: one.end].endswith(("}", ">"))
    return not is_line and len(joint) < 30 and LISTED.fullmatch(joint) is not None and not same(one.text, other.text)


def last_number(reply: str) -> str:
    """The number that the reply names as its answer, else the last it says, such as `-1234.5`; "" if it hedges."""
    said = spoken(reply)
    named = marked(said)
    if named is not None:
        line = number_text.plain(named)
        return pick(line, number_text.read(line) or number_text.read_words(line), is_first=True)
    if tidy(said).casefold() in NOTHING:
        return "0"
    said = ENUMERATION.sub("", said) if len(ENUMERATION.findall(said)) > 1 else said
    lines = [line for line in SENTENCES.split(said) if line.strip()]
    return last_in(lines, number_text.read) or ("" if has_digits(said) else last_in(lines, number_text.read_words))


def has_digits(text: str) -> bool:
    """Whether the text writes a number in other signs than letters."""
    return any(character.isnumeric() for character in text)


def last_in(lines: list[str], read: Callable[[str], list[Number]]) -> str:
    """The number of the last line that has any; "" if that line has formulas alone, hedges or is over-long."""
    for place in range(len(lines) - 1, max(-1, len(lines) - 1 - MAX_LINES), -1):
        if read is number_text.read and WORDS_ALONE.fullmatch(lines[place]):
            continue
        line = number_text.plain(lines[place])
        found = read(line)
        if not line or any(not number.is_aside for number in found):
            return "" if place and are_guesses(lines[place - 1], lines[place]) else pick_said(line, found)
    return ""


def are_guesses(before: str, line: str) -> bool:
    """Whether two lines are nothing but different numbers."""
    one, other = number_text.whole(before.strip(BLANKS)), number_text.whole(line.strip(BLANKS))
    return one is not None and other is not None and one.value != other.value


def pick_said(line: str, found: list[Number]) -> str:
    """The number behind `the answer is` of a line, else its last."""
    said = [match.end() for match in ANSWER_IS.finditer(line)]
    behind = [number for number in found if said and number.start >= said[-1]]
    return pick(line, behind or found, is_first=bool(behind))


def pick(line: str, found: list[Number], is_first: bool) -> str:
    """The first or last number of those found in the line; "" if another one stands beside it as a rival."""
    valid = [number for number in found if not number.is_aside and number.value is not None]
    if not valid:
        return ""
    chosen = valid[0 if is_first else -1]
    live = [number for number in found if not number.is_aside]
    rivals = [pair for pair in pairwise(live) if is_hedge(line, *pair)]
    rivals += [pair for pair in pairwise(with_words(line, found)) if is_doubt(line, *pair)]
    if any(chosen.value in (one.value, other.value) and one.value != other.value for one, other in rivals):
        return ""
    return number_text.shown(chosen)


def with_words(line: str, found: list[Number]) -> list[Number]:
    """The numbers found and those that the line has in words, in order."""
    spelt = [
        word for word in number_text.read_words(line) if all(word.start >= n.end or word.end <= n.start for n in found)
    ]
    return sorted([*found, *spelt], key=attrgetter("start"))


def is_doubt(line: str, one: Number, other: Number) -> bool:
    """Whether the words between two numbers, in digits or words, make them alternatives: `or`, a comma alone."""
    gap = line[one.end : other.start]
    said = said_in(gap)
    is_list = not one.is_aside and not other.is_aside and gap.strip() != "" and said <= JOINS and "=" not in gap
    return bool(DOUBTS & said) or (is_list and one.value is not None and other.value is not None)


def is_hedge(line: str, one: Number, other: Number) -> bool:
    """Whether two numbers beside each other are alternatives, a list or a range, or two parts of one amount."""
    gap = line[one.end : other.start]
    said = said_in(gap)
    if REASONS & said:
        return False
    rest = said - JOINS - EQUALS
    has_formula = one.value is None or other.value is None
    if "=" in gap or EQUALS & said:
        return not has_formula and len(rest) <= 1 and (not rest or re.search(r"[,;]|\band\b", gap) is not None)
    if has_formula and "(" in gap:
        return False
    return not rest or (len(rest) == 1 and re.search(r"[.!?:(]", gap) is None)


def said_in(gap: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(word.casefold() for word in re.findall(r"[^\W\d_]+", gap))


def tagged(reply: str) -> str:
    """The answer that the last mark of the reply names, else its last line, there the part behind `the answer is`."""
    said = spoken(reply)
    named = marked(said)
    if named is not None:
        return tidy(named)
    line = said.strip().rpartition("\n")[2]
    behind = [match.end() for match in ANSWER_IS.finditer(line)]
    return tidy(line[behind[-1] :] if behind else line)


def chosen_option(reply: str) -> str:
    """The one choice A-Z that the tagged answer names as a label; "" when it names none, or hedges."""
    text = tidy(re.sub(r"\\(?:text|math)[a-z]{0,3}\{([^{}]*)\}|[*`_$]", r"\1", tagged(reply)))
    if len(text) > number_text.MAX_LINE_CHARS:
        return ""
    label = LABEL.match(text)
    if label is not None:
        rest = before_reason(text[label.end() :])
        others = others_in(rest, is_lower=label[1].islower())
        is_list = LABEL.match(rest) is not None
        return "" if is_list or others - {label[1].upper()} else label[1].upper()
    stated = before_reason(text)
    named = list(NAMED.finditer(stated))
    letters = {match[1] for match in [*named, *BRACKETED.finditer(stated)]}
    if named:
        letters |= others_in(stated[named[0].end() :], is_lower=False)
    return letters.pop() if len(letters) == 1 else ""


def before_reason(text: str) -> str:
    """The text up to the reason that it gives."""
    reason = REASON.search(text)
    return text[: reason.start()] if reason else text


def others_in(text: str, *, is_lower: bool) -> set[str]:
    """The letters that the text adds to one before it: `or C`, `, D`."""
    pattern = re.compile(ANOTHER.pattern, re.IGNORECASE) if is_lower else ANOTHER
    return {(match[1] or match[2]).upper() for match in pattern.finditer(text)}


def tidy(text: str) -> str:
    """Without the marks that models put around an answer: blanks, emphasis, quotes, math, `\\text{…}`, a full stop."""
    tidied = text.strip()
    for _ in range(MAX_WRAPPERS):
        before, tidied = tidied, unwrapped(tidied.strip().removesuffix("."))
        if tidied == before:
            break
    return tidied


def unwrapped(text: str) -> str:
    """The text without a pair of marks around all of it."""
    for opening, closing in WRAPPERS:
        inner = text[len(opening) : len(text) - len(closing)]
        is_around = len(text) > len(opening + closing) and text.startswith(opening) and text.endswith(closing)
        if is_around and opening not in inner and closing not in inner:
            return inner.strip()
    return text.strip()


def folded(text: str) -> str:
    """A text as it is compared: whatever its case, spacing, quotes and Unicode form."""
    tidied = tidy(text)
    if len(tidied) > MAX_FOLDED_CHARS:
        return " ".join(tidied.casefold().split())
    signs = (tidied if tidied.isascii() else number_text.ascii_digits(tidied.translate(QUOTES))).casefold()
    signs = re.sub(r"\\([%$#&])", r"\1", signs).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return re.sub(r" ?([^\w\s]) ?", r"\1", " ".join(signs.split())).rstrip("!")


def value(text: str) -> Fraction | None:
    """The number that the whole text is, exactly, or None."""
    number = number_text.whole(text)
    return number.value if number else None


def same(found: str, right: str) -> bool:
    """Whether two answers are equal as numbers, or as text whatever its case and spacing."""
    left, expected = folded(found), folded(right)
    if left == expected:
        return left != ""
    if AS_WRITTEN.match(left) or AS_WRITTEN.match(expected):
        return False
    number = value(found)
    return number is not None and number == value(right)


def same_number(found: str, right: str) -> bool:
    """Whether two numbers are equal; a percentage also equals its bare number, as the question asked for per cent."""
    left, expected = number_text.whole(found), number_text.whole(right)
    if left is None or expected is None or left.value is None or expected.value is None:
        return False
    factor = Fraction(100) ** (left.is_percent - expected.is_percent)
    return expected.value in (left.value, left.value * factor)


def digits_right(found: str, right: str) -> float:
    """Share of the sign and the digits of two whole numbers that agree, place by place from the units; else 0."""
    left, expected = value(tidy(found)), value(tidy(right))
    if left is None or expected is None or left.denominator != 1 or expected.denominator != 1:
        return 0.0
    pair = [str(abs(number.numerator))[::-1] for number in (left, expected)]
    agree = sum(one == other for one, other in zip(*pair, strict=False)) + (left * expected >= 0)
    return agree / (max(map(len, pair)) + 1)
