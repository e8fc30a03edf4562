"""Numbers in a line of text, read as a person reads them: each is a maximal token, and has one value or none.

`1/2`, `2½`, `10^3`, `1e3`, `50%`, `1,234`, `1 234`, `-$12` and `2.5 million` are one number each. `7-3`, `12:30`, `3x`,
`1.2.3` and `> 5` are none: no part of them is ever taken for a number. Digits of names and units (`x_1`, `cm^2`) are
passed over. Every pattern takes time linear in the line, and a line has at most MAX_LINE_CHARS.
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

MAX_LINE_CHARS = 2_000
"""A longer line has no number: what is a number depends on all of it."""
MAX_NUMBER_CHARS = 64
"""A longer number is none: reading a million digits takes time quadratic in their number."""
AROUND_CHARS = 40
"""How far a number's meaning depends on the words before and behind it."""


def words(text: str) -> frozenset[str]:
    """The words of a text, to look a word up in."""
    return frozenset(text.split())


OTHER = "\u2298"
"""Stands for a formula (a root, a fraction of formulas, π): next to it nothing is a number."""
DIGITS = r"(?:\d+(?:[.,'_]\d+)*+|\.\d+)(?:[eE][-+]?\d+)?+"
ATOM = rf"(?:[$€£¥₹]\ ?)?[-+]?(?:{DIGITS}|{OTHER}|[b-zB-HJ-Z](?:_?\d+)?(?!\w))"
JOINT = r"(?::(?=\d)|\ ?(?:\*\*|[-+*/^±])\ ?|\ (?=\d+\ ?/\ ?\d))"
CHAIN = re.compile(rf"(?<![\w.^])(?<![\w^][-'.])(?:[-+±]\ ?)?(?:{ATOM})(?:{JOINT}{ATOM})*+")
"""A number or a formula: what is joined by operators without a word between."""

NAME = re.compile(r"[a-zA-Z](?:_?\d+)?")
UNIT = re.compile(r"\ ?([^\W\d_]+)(?:\ ?\^\ ?-?\d|\d)?(?:\ ?/\ ?[^\W\d_]+(?:\ ?\^\ ?-?\d|\d)?)?")
"""A unit behind a number, as in `9.8 m/s^2`."""
EXPONENT = re.compile(r"[-+]?\d+")
PLAIN = re.compile(r"\d+|\d*\.\d+")
GROUPED = re.compile(r"[1-9]\d{0,2}(?:(?:,\d{3})+|(?:'\d{3})+|(?:_\d{3})+|(?:,\d\d)+,\d{3})(?:\.\d+)?")
CONTINENTAL = re.compile(r"[1-9]\d{0,2}(?:(?:\.\d{3}){2,}|(?:\.\d{3})+,\d+)")
COMMA = re.compile(r"\d+,0*[1-9]\d*")
POWER_OF_TEN = re.compile(r"(.+?)\ ?\*\ ?10\ ?(?:\^|\*\*)\ ?([-+]?\d+)")
POWER = re.compile(r"(.+?)\ ?(?:\^|\*\*)\ ?([-+]?\d+)")
RATIO = re.compile(r"(?:(\d+)\ )?([^ ]+?)\ ?/\ ?([^ ]+)")

MULTIPLES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
ATTACHED = {"k": 10**3, "K": 10**3, "M": 10**6, "bn": 10**9}
PARTS = ("half", "third", "quarter", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
SHARES = {word: Fraction(1, number) for number, word in enumerate(PARTS, 2)}
SHARES |= {"halve": Fraction(1, 2), "fourth": Fraction(1, 4), "hundredth": Fraction(1, 100)}
SHORT_UNITS = words("""
    m g s h l L W V A J N K C F B t km cm mm nm kg mg ml mL dm kW kB MB GB TB Hz Pa Nm ft lb lbs oz mi
    yd hr min sec kJ mA mV
""")
FORMULAS = words("pi sqrt sin cos tan log ln exp mod squared cubed factorial choose root th st nd rd")
MULTIPLE = re.compile(rf"(?:\ ?({'|'.join(MULTIPLES)})s?|({'|'.join(ATTACHED)}))\b")
SHARE = re.compile(rf"[ -]({'|'.join(SHARES)})s?\b")
AND_SHARE = re.compile(rf"\ and (?:a|one)[ -]({'|'.join(SHARES)})\b")
PERCENT = re.compile(r"\ ?(?:%|percent\b|per cent\b)", re.IGNORECASE)
LETTERS = re.compile(r"\ ?([^\W\d_]+)")
LEADS_ON = re.compile(
    rf"\.[.\d]|[,'_:]\d|\.?\ ?{OTHER}|[(\w√]|\ ?(?:[*^±√|]|/(?![^\W\d_]{{3}})|[-+]\ ?[(]|\+(?!\w))|"
    r"\ or (?:more|less|fewer)\b"
)
BOUNDED = re.compile(
    r"(?:\b(?:than|least|most|above|below|under|over|up to|exceeds?|nearly|almost)|equal to or)\ ?[$€£]?\ ?$",
    re.IGNORECASE,
)
DENIED = re.compile(
    r"(?:\bnot|n't|\bnever|\binstead of|\brather than)(?: be| equal| to| exactly| the)*\ ?[$€£]?\ ?$", re.IGNORECASE
)
REFERENCE = re.compile(
    r"\b(?:steps?|equations?|eqs?\.?|parts?|sections?|lines?|notes?|tables?|figures?|fig\.|pages?|questions?|problems?|"
    r"examples?|methods?|rules?|theorems?|chapters?|items?|attempts?|footnotes?)(?: no\.?| number)?\ ?[(#]?$|"
    r"\bnearest\ ?$",
    re.IGNORECASE,
)
ARGUMENT = re.compile(r"(?<![^\W\d_])[^\W\d_]\($|\d[:.'_*/^+-]$")
ROUNDING = re.compile(r"\ (?:decimals?|digits?|significant|places|dp)\b", re.IGNORECASE)

WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
SMALL = {word: number for number, word in enumerate(f"{WORDS} eighteen nineteen".split())}
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
SMALL |= {word: 10 * number for number, word in enumerate(TENS.split(), 2)}
SPELT_WORD = "|".join(sorted([*SMALL, *MULTIPLES], key=len, reverse=True))
SPELT = re.compile(
    rf"(?<![\w-])(?:(?:minus|negative)\ )?(?:{SPELT_WORD})(?:(?:[ -]|\ and\ )(?:{SPELT_WORD}))*+(?![\w])", re.IGNORECASE
)
PRONOUN = re.compile(r"\b(?:the|no|this|that|each|which|any|every|last|first|correct|another|only)\ $", re.IGNORECASE)


@dataclass(frozen=True)
class Number:
    """A number in a line, or what has digits and is none."""

    value: Fraction | None
    """None for a formula, a time, a bound, …"""
    start: int
    end: int
    is_percent: bool = False
    is_aside: bool = False
    """Whether it tells of something else: a step, a rounding, what the answer is not."""


def read(line: str) -> list[Number]:
    """Every number of a plain line (see `plain`) that is written in digits, in order."""
    found: list[Number] = []
    place = 0
    while match := CHAIN.search(line, place):
        place = match.end()
        if any(c.isdigit() or c == OTHER for c in match[0]) and not NAME.fullmatch(match[0]):
            found.append(classified(line, match.start(), match.end()))
            unit = UNIT.match(line, found[-1].end)
            place = unit.end() if unit and unit[1] in SHORT_UNITS else found[-1].end
    return found


def classified(line: str, start: int, end: int) -> Number:
    """The kind of the chain line[start:end], seen with the words around it."""
    before, after = line[max(0, start - AROUND_CHARS) : start], line[end : end + AROUND_CHARS]
    number = with_suffix(chain_value(line[start:end]), start, end, after)
    is_aside = bool(DENIED.search(before) or REFERENCE.search(before)) or is_rounding(before, after)
    is_aside = is_aside or (before.endswith("[") and after.startswith("]") and end - start <= 2 and start > 1)
    rest = line[number.end : number.end + AROUND_CHARS]
    is_none = leads_on(rest, number.end > end) or is_led_to(before, line[start]) or BOUNDED.search(before) is not None
    return Number(None if is_none else number.value, start, number.end, number.is_percent, is_aside)


def is_rounding(before: str, after: str) -> bool:
    """Whether it is the 2 of `rounded to 2 digits`."""
    return before.rstrip().lower().endswith((" to", "(to")) and ROUNDING.match(after) is not None


def is_led_to(before: str, first: str) -> bool:
    """Whether what stands before makes it a part of something larger, or a bound."""
    last = before.rstrip()[-1:]
    is_joined = last != "" and last in f"/*^{{√<>≤≥≠|{OTHER}"
    return is_joined or ARGUMENT.search(before) is not None or (before.endswith(")") and first in "-+±")


def leads_on(after: str, has_suffix: bool) -> bool:
    """Whether what stands behind makes it a part of something larger: `3x`, `2(5)`, `3.33...`, `2 π`, `5th`."""
    word = LETTERS.match(after)
    if word is None or (has_suffix and word[0][0] == " "):
        return LEADS_ON.match(after) is not None
    if word[1].lower() in FORMULAS:
        return True
    is_attached = word[0][0] != " "
    if len(word[1]) == 1 and not is_attached and word[1] in "aI":
        return False
    is_unit = word[1] in SHORT_UNITS or len(word[1]) >= 3
    is_formula = (len(word[1]) == 1 or is_attached) and not is_unit
    return is_formula or (not is_attached and LEADS_ON.match(after) is not None)


def with_suffix(value: Fraction | None, start: int, end: int, after: str) -> Number:
    """The number with the percent sign, the multiple or the share behind it."""
    if percent := PERCENT.match(after):
        return Number(value and value / 100, start, end + percent.end(), is_percent=True)
    for pattern, sizes in ((MULTIPLE, {**MULTIPLES, **ATTACHED}), (SHARE, SHARES), (AND_SHARE, SHARES)):
        if found := pattern.match(after):
            size = Fraction(sizes[found[1] or found[2]] if pattern is MULTIPLE else sizes[found[1]])
            total = value and (value + size if pattern is AND_SHARE else value * size)
            return Number(total, start, end + found.end())
    return Number(value, start, end)


def chain_value(chain: str) -> Fraction | None:
    """The value of a chain that is one number: plain, a power, a fraction, a mixed number; of any other None."""
    text = re.sub(r"[$€£¥₹]\ ?", "", chain).strip()
    sign = re.match(r"[-+]\ ?", text)
    body = text[sign.end() :] if sign else text
    if len(body) > MAX_NUMBER_CHARS:
        return None
    found = unsigned(body)
    return -found if found is not None and sign and sign[0][0] == "-" else found


def unsigned(body: str) -> Fraction | None:
    """The value of a number without its sign, or None."""
    if power := POWER_OF_TEN.fullmatch(body):
        return scaled(digits(power[1]), Fraction(10), power[2])
    if power := POWER.fullmatch(body):
        base = digits(power[1])
        return None if base is None else scaled(Fraction(1), base, power[2])
    if ratio := RATIO.fullmatch(body):
        top, bottom = digits(ratio[2]), digits(ratio[3])
        return top / bottom + int(ratio[1] or 0) if top is not None and bottom else None
    return digits(body)


def scaled(factor: Fraction | None, base: Fraction, exponent: str) -> Fraction | None:
    """factor · base^exponent, or None if that is beyond all bounds."""
    is_long = len(exponent) > 4 or len(str(base)) * abs(int(exponent)) > MAX_NUMBER_CHARS
    if factor is None or is_long or (base == 0 and int(exponent) < 0):
        return None
    return factor * base ** int(exponent)


def digits(text: str) -> Fraction | None:
    """The value of digits with separators and an exponent, or None if they group no number."""
    mantissa, _, exponent = text.lower().partition("e")
    if exponent:
        return scaled(digits(mantissa), Fraction(10), exponent) if EXPONENT.fullmatch(exponent) else None
    if PLAIN.fullmatch(mantissa):
        return Fraction(mantissa)
    if GROUPED.fullmatch(mantissa):
        return Fraction(re.sub("[,'_]", "", mantissa))
    if CONTINENTAL.fullmatch(mantissa):
        return Fraction(mantissa.replace(".", "").replace(",", "."))
    return Fraction(mantissa.replace(",", ".")) if COMMA.fullmatch(mantissa) else None


def read_words(line: str) -> list[Number]:
    """Every number of a plain line that is written in words: `forty-two`, `three thousand`, `two thirds`."""
    return [word for match in SPELT.finditer(line) if (word := spelt(line, match)) is not None]


def spelt(line: str, match: re.Match[str]) -> Number | None:
    """The number of a run of number words; None for the pronoun `one`."""
    before, after = line[max(0, match.start() - AROUND_CHARS) : match.start()], line[match.end() :][:AROUND_CHARS]
    words = [word.lower() for word in re.findall(r"[A-Za-z]+", match[0])]
    if words == ["one"] and (PRONOUN.search(before) or after.startswith(" of ")):
        return None
    is_negative = words[0] in ("minus", "negative")
    value = words_value([word for word in words[is_negative:] if word != "and"])
    number = with_suffix(value and (-value if is_negative else value), match.start(), match.end(), after)
    is_aside = bool(DENIED.search(before) or REFERENCE.search(before)) or is_rounding(before, after)
    value = None if BOUNDED.search(before) else number.value
    return Number(value, match.start(), number.end, number.is_percent, is_aside)


def words_value(words: list[str]) -> Fraction | None:
    """The value of number words in their usual order, else None (`two three`)."""
    total = part = 0
    lowest = MAX_NUMBER_CHARS
    for word in words:
        if word in MULTIPLES:
            size = MULTIPLES[word]
            total, part = (total, max(part, 1) * size) if size <= 100 else (total + max(part, 1) * size, 0)
            lowest = MAX_NUMBER_CHARS if size <= 1000 or not part else lowest
            continue
        width = len(str(SMALL[word])) if SMALL[word] < 20 and SMALL[word] != 0 else 2
        if SMALL[word] >= 20 and part % 100 == 0:
            part, lowest = part + SMALL[word], 2
        elif part % 100 == 0 or (lowest == 2 and width == 1 and part % 10 == 0):
            part, lowest = part + SMALL[word], 0
        else:
            return None
    return Fraction(total + part)


LATEX = tuple(
    (re.compile(pattern), text)
    for pattern, text in (
        (r"<<[^<>]*>>", ""),
        (r"<sup>\s*([-+]?\d+)\s*</sup>", r"^\1"),
        (r"</?[a-zA-Z][^<>]{0,40}>", " "),
        (r"\\!|\\(?:left|right|displaystyle|boxed)(?![a-zA-Z])", ""),
        (r"\\[,;: ()\[\]]|~|\\q?quad(?![a-zA-Z])", " "),
        (r"\{,\}", ","),
        (r"\\([$%#_&])", r"\1"),
        *[(r"\\(?:text|math|operatorname|mbox)[a-z]{0,3}\s?\{([^{}]*)\}", r" \1 ")] * 2,
        (r"\^\s?\{?\s?\\circ\s?\}?|\\degree(?![a-zA-Z])|°", " degrees"),
        (r"\^\s?\{\s?([-+]?\d+)\s?\}", r"^\1"),
        (r"\\[dtc]?frac\s?\{\s?(-?[\d.,]+)\s?\}\s?\{\s?([\d.,]+)\s?\}", r" \1/\2 "),
        (r"\\[dtc]?frac\s?(\d)\s?(\d)(?!\d)", r" \1/\2 "),
        (r"\\[dtc]?frac\s?\{\s?(\d+)\s?\}\s?(\d)(?!\d)", r" \1/\2 "),
        (r"\\[dtc]?frac\s?(\d)\s?\{\s?(\d+)\s?\}", r" \1/\2 "),
        (r"\\(?:times|cdot|ast)(?![a-zA-Z])|[×·⋅∗]", "*"),
        (r"\\div(?![a-zA-Z])|÷|\u2044|\u2215", "/"),
        (r"\\(?:leq?|geq?|lt|gt|neq?|ll|gg|leqslant|geqslant)(?![a-zA-Z])|!=|<=(?!=)|(?<!=)>=|≯|≮", " ≤ "),
        (r"\\pm(?![a-zA-Z])", "±"),
        (r"\\(?:approx|to|implies|[Rr]ightarrow|Longrightarrow|therefore|equiv)(?![a-zA-Z])|[-=]+>|[→⇒⟹≈≡∴]|:=", " = "),
        (r"\\[a-zA-Z]+|(?<=\d)[\u0300-\u036f\u20d0-\u20ff]", OTHER),
        (r"\bsqrt\b|√", OTHER),
        (r"(?<=\d)\s?[xX]\s?(?=\d)", "*"),
        (r"(?i)\b(?:minus|negative)\s(?=[\d.$€£])", "-"),
        (r"(?i)(?<=\d)\s(?:plus)\s(?=\d)", " + "),
        (r"(?i)(?<=\d)\s(?:times|multiplied by)\s(?=\d)", " * "),
        (r"(?i)(?<=\d)\sdivided by\s(?=\d)", " / "),
        (r"(?<!\S)\*+(?=\S)|(?<=\S)\*+(?!\S)|^\*+|\*+$|`+|(?<!\w)_+(?=\S)|(?<=\S)_+(?!\w)", ""),
        (r"(?<![\w*])\*\*(?=[-$\d])|(?<=[\d%])\*\*(?![\w(])", ""),
        (r"\s+", " "),
    )
)
SPACED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?![\d,/]|\.\d)")
"""Thousands apart: 1 234 567."""
DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"), "-") | {0x2014: " ; ", 0x2015: " ; "}
ARABIC = {0x066B: ".", 0x066C: ",", 0x066A: "%", 0x2019: "'", 0x2018: "'"}
RAISED = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u207b]+")
VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e\u2189]")


def plain(line: str) -> str:
    """A line in the signs that `read` knows: no LaTeX, no markdown, every digit ASCII; too long a line is "" """
    if len(line) > MAX_LINE_CHARS:
        return ""
    text = " ".join((line if line.isascii() else ascii_digits(line)).split())
    for pattern, replacement in LATEX:
        text = pattern.sub(replacement, text)
    return SPACED.sub(lambda match: match[0].replace(" ", ""), text).strip()


def ascii_digits(text: str) -> str:
    """Raised digits as powers, ½ as ` 1/2`, the digits of every script as ASCII, NFKC."""
    text = RAISED.sub(lambda match: "^" + unicodedata.normalize("NFKC", match[0]).replace("\u2212", "-"), text)
    text = VULGAR.sub(lambda match: f" {unicodedata.normalize('NFKC', match[0])} ", text)
    text = unicodedata.normalize("NFKC", text.replace("\u2080", "_0")).translate(DASHES | ARABIC)
    kept = (character for character in text if unicodedata.category(character) != "Cf")
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in kept)


def whole(text: str) -> Number | None:
    """The number that the whole text is, without a unit, or None."""
    line = plain(text).strip("$ ")
    found = read(line)
    is_all = len(found) == 1 and found[0].value is not None and (found[0].start, found[0].end) == (0, len(line))
    return found[0] if is_all else None


def shown(number: Number) -> str:
    """The number as short text that `whole` reads back: `42`, `-0.5`, `1/3`, `50%`."""
    if number.value is None:
        return ""
    value = number.value * 100 if number.is_percent else number.value
    text = decimal(value) + "%" * number.is_percent
    return text if len(text) <= MAX_NUMBER_CHARS else ""


def decimal(value: Fraction) -> str:
    """A fraction as a decimal where that ends soon, else as a/b."""
    if value.denominator == 1:
        return str(value.numerator)
    for places in range(1, 20):
        if 10**places % value.denominator == 0:
            digits_only = str(abs(value.numerator) * (10**places // value.denominator)).rjust(places + 1, "0")
            return "-" * (value < 0) + f"{digits_only[:-places]}.{digits_only[-places:]}"
    return f"{value.numerator}/{value.denominator}"
