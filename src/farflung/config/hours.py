"""Hours of the week as an owner writes them, such as `mon-fri 19:00-07:00, sat-sun`, in local time. Pure."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MINUTES = 24 * 60
WEEK_MINUTES = 7 * DAY_MINUTES
PART = re.compile(r"(?:([a-z]{3})(?:-([a-z]{3}))?)?(?:(?:^|\s+)(\d\d:\d\d)-(\d\d:\d\d))?")
HOW = "write days and hours such as 'mon-fri 19:00-07:00, sat-sun'"


@dataclass(frozen=True)
class Hours:
    """Spans of minutes of the week, from Monday 00:00; one that goes on after Sunday ends beyond the week's last."""

    spans: tuple[tuple[int, int], ...]

    def has(self, minute: float) -> bool:
        """Whether a minute of the week is within; always, where no hours are named."""
        return not self.spans or self.minutes_until_open(minute) == 0

    def minutes_until_open(self, minute: float) -> float:
        """From a minute of the week until the next one that is within, 0 where it is itself."""
        return min((_until(span, minute) for span in self.spans), default=0.0)


def _until(span: tuple[int, int], minute: float) -> float:
    start, end = span
    since = (minute - start) % WEEK_MINUTES
    return 0.0 if since < end - start else WEEK_MINUTES - since


def parse(text: str) -> Hours:
    """Spans with commas between them. A night belongs to the day on which it begins. Raises ValueError."""
    parts = [part.strip() for part in text.lower().split(",")] if text.strip() else []
    return Hours(tuple(span for part in parts for span in _spans(part)))


def _spans(part: str) -> Iterator[tuple[int, int]]:
    found = PART.fullmatch(part)
    if not part or found is None:
        raise ValueError(f"{part!r} is no span of hours; {HOW}")
    first, last, start, end = found.groups()
    begins, ends = (minute_of_day(start), minute_of_day(end)) if start else (0, DAY_MINUTES)
    if begins in (ends, DAY_MINUTES):
        raise ValueError(f"{part!r} begins when it ends; {HOW}")
    for day in _days(first or DAYS[0], last or first or DAYS[-1]):
        yield day * DAY_MINUTES + begins, day * DAY_MINUTES + ends + DAY_MINUTES * (ends < begins)


def _days(first: str, last: str) -> Iterator[int]:
    """Numbers of the days from one to another, over Sunday if need be."""
    for name in (first, last):
        if name not in DAYS:
            raise ValueError(f"{name!r} is no day; the days are {', '.join(DAYS)}")
    start, end = DAYS.index(first), DAYS.index(last)
    for number in range((end - start) % 7 + 1):
        yield (start + number) % 7


def minute_of_day(text: str) -> int:
    """`19:30` as minutes since midnight, `24:00` for the day's end. Raises ValueError."""
    hour, colon, minute = text.partition(":")
    is_well = colon and len(hour) == len(minute) == 2 and hour.isdecimal() and minute.isdecimal() and text.isascii()
    found = int(hour) * 60 + int(minute) if is_well else -1
    if not 0 <= found <= DAY_MINUTES or int(minute) > 59:
        raise ValueError(f"{text!r} is no time of day; write one from 00:00 to 24:00")
    return found


UNITS_S = {"d": 86_400, "h": 3600, "m": 60, "s": 1}
MOST_S = 366 * 86_400


def duration_s(text: str) -> int:
    """`3h`, `90m` or `1d12h` in seconds. Raises ValueError."""
    found = re.fullmatch(r"(?:(\d{1,6})d)?(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,8})s)?", text, re.ASCII)
    total = sum(int(n or 0) * unit for n, unit in zip(found.groups(), UNITS_S.values(), strict=True)) if found else 0
    if not 0 < total <= MOST_S:
        raise ValueError(f"{text!r} is no duration; write one such as 3h, 90m or 1d12h, of a year at most")
    return total
