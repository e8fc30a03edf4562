"""Looks of a page: the Jinja environment, its filters, and charts as SVG. Everything is escaped."""

import json
import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from farflung.protocol.messages import EvalView, StepView
from farflung.protocol.shown import visible
from farflung.queries.story import Moment

HERE = Path(__file__).parent
ID = re.compile(
    r"(?<![\w-])(?:[rglat][0-9a-f]{12}|t[0-9a-f]{16}|n[a-z2-7]{16}|[a-z0-9][a-z0-9-]{0,40}-step-\d+|[0-9a-f]{64})(?![\w-])"
)
STATES = (
    *("joined", "starting", "waiting", "fetching", "generating", "submitting", "training", "publishing"),
    *("auditing", "evaluating", "scoring", "mirroring", "serving", "suspended", "vacated"),
)
"""Phases that have a colour; a node may say anything."""
TEXT_SHOWN = 20_000
POINTS = 600
Point = tuple[float, float]
Spot = tuple[float, ...]
"""A step and its value, with the ends of an interval where there is one."""


def environment(**shared: Any) -> Environment:
    """Templates of the dashboard and the report, with autoescape on for all of them, and values that all may use."""
    env = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {
        "ago": ago,
        "cell": cell,
        "clean": clean,
        "compact": compact,
        "fields": fields,
        "log10": math.log10,
        "count": count,
        "fixed": fixed,
        "link": link,
        "linked": linked,
        "percent": percent,
        "size": size,
        "usd": usd,
        "when": when,
    }
    env.filters.update(filters)
    cast(dict[str, Any], env.globals).update(curve=curve, known=STATES, tojson_text=json.dumps, **shared)
    return env


# --- text from strangers ---------------------------------------------------------------------------------------------


def clean(text: str, limit: int = TEXT_SHOWN) -> str:
    """Text whose control and direction characters are shown, not obeyed, cut to `limit` characters."""
    shown = visible(text[:limit])
    return shown if len(text) <= limit else f"{shown}… ({len(text) - limit:,} more characters)"


def link(id: str | None, text: str = "") -> Markup | str:
    """An id as a link to its story; long digests are shortened."""
    if not id:
        return "–"
    shown = text or (f"{id[:10]}…" if len(id) == 64 else id)
    return Markup('<a class="{}" href="/story/{}"{}>{}</a>').format(
        "name" if text else "id", id, Markup(' title="{}"').format(id) if shown != id else "", clean(shown, 100)
    )


def linked(text: str) -> Markup:
    """Text with every id in it made a link."""
    cleaned, out, last = clean(text), Markup(), 0
    for match in ID.finditer(cleaned):
        out += escape(cleaned[last : match.start()]) + Markup(link(match[0]))
        last = match.end()
    return out + escape(cleaned[last:])


def cell(value: Any) -> Markup | str:
    """Any value in a table or list of facts."""
    if value is None or value == "":
        return "–"
    if isinstance(value, Moment):
        return when(value)
    if isinstance(value, float):
        return fixed(value, 4)
    return linked(str(value)) if isinstance(value, str) else count(value)


def fields(detail: str) -> list[tuple[str, str]]:
    """The detail of an event as names and values."""
    found: dict[str, Any] = json.loads(detail or "{}")
    return [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in found.items()]


# --- numbers ---------------------------------------------------------------------------------------------------------


def count(value: float | None) -> str:
    """A whole number with thousands apart."""
    return "–" if value is None else f"{value:,.0f}"


def compact(value: float | None) -> str:
    """A number in at most four characters and a letter."""
    if value is None or not math.isfinite(value):
        return "–"
    for bound, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= bound:
            scaled = value / (1e3 if letter == "k" else bound)
            return f"{scaled:.1f}{letter}" if abs(scaled) < 100 else f"{scaled:.0f}{letter}"
    return f"{value:,.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.1f}"


def fixed(value: float | None, digits: int = 2) -> str:
    """A number with so many decimals."""
    return "–" if value is None else f"{value:,.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share."""
    return "–" if value is None else f"{value * 100:.{digits}f} %"


def usd(value: float | None) -> str:
    """Money, with more decimals the less it is."""
    return "–" if value is None else f"${value:,.{2 if value >= 10 else 3 if value >= 0.1 else 4}f}"


def size(value: int) -> str:
    """Bytes."""
    amount = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:,.1f} TB"


def ago(seconds: float) -> str:
    """A span of time in its largest unit."""
    seconds = max(0.0, seconds)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def when(at: float | None) -> Markup | str:
    """A moment; the page's script, where there is one, turns it into local time."""
    if at is None:
        return "–"
    moment = datetime.fromtimestamp(at, UTC)
    return Markup('<time datetime="{}" title="{} UTC">{}</time>').format(
        moment.isoformat(timespec="seconds"), moment.strftime("%Y-%m-%d %H:%M:%S"), moment.strftime("%H:%M:%S")
    )


# --- curves ----------------------------------------------------------------------------------------------------------


def thin(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """At most so many points; neighbours are averaged."""
    width = math.ceil(len(points) / most) or 1
    chunks = [points[i : i + width] for i in range(0, len(points), width)]
    return [(chunk[-1][0], sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def curves(steps: Sequence[StepView], evals: Sequence[EvalView]) -> dict[str, list[Spot]]:
    """The curves of a run as lists of (step, value), those of held-out tasks with the ends of their intervals."""
    sampled = [view for view in evals if view.pass_k is not None]
    return {
        "reward": [_rounded(x, y) for x, y in thin([(step.step, step.reward) for step in steps])],
        "heldout": [_rounded(view.step, view.score, view.low, view.high) for view in evals],
        "passk": [_rounded(v.step, v.pass_k or 0.0, v.pass_k_low or 0.0, v.pass_k_high or 0.0) for v in sampled],
    }


def _rounded(step: float, *values: float) -> Spot:
    return (step, *(round(value, 5) for value in values))


WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640.0, 220.0, 36.0, 24.0, 10.0, 10.0


def curve(points: Sequence[Spot], label: str, until: float = 1.0, also: Sequence[Spot] = ()) -> Markup:
    """Values in [0, 1] over steps 0 … `until` as SVG, coloured by the page's style; `also` is a second line.

    A point with four numbers has the ends of an interval, drawn as a band.
    """
    last = max([until, 1.0, *(spot[0] for spot in [*points, *also])])
    parts = [*_axes(last), *_curve(also, last, " also"), *_curve(points, last)]
    return Markup('<svg class="curve" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, Markup("").join(parts)
    )


def _place(x: float, y: float, last: float) -> Point:
    return (
        round(LEFT + x / last * (WIDTH - LEFT - RIGHT), 1),
        round(TOP + (1 - min(1.0, max(0.0, y))) * (HEIGHT - TOP - BOTTOM), 1),
    )


def _axes(last: float) -> list[Markup]:
    heights = [(y, _place(0, y, last)[1]) for y in TICKS]
    grid = [Markup('<path class="grid" d="M{} {}H{}"/>').format(LEFT, height, WIDTH - RIGHT) for _, height in heights]
    marks = [
        Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(LEFT - 6, height + 4, f"{y:g}")
        for y, height in heights
    ]
    marks += [
        Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(
            _place(x, 0, last)[0], HEIGHT - 6, anchor, f"{x:g}"
        )
        for x, anchor in ((0, "start"), (last, "end"))
    ]
    return grid + marks


def _curve(points: Sequence[Spot], last: float, kind: str = "") -> list[Markup]:
    """One line with its band and its dots."""
    lows, highs = ([_place(p[0], p[i], last) for p in points if len(p) == 4] for i in (2, 3))
    spots = [_place(p[0], p[1], last) for p in points]
    band = Markup('<polygon class="band{}" points="{}"/>').format(kind, _joined(highs + lows[::-1]))
    line = Markup('<polyline class="line{}" points="{}"/>').format(kind, _joined(spots))
    dots = [Markup('<circle class="dot{}" cx="{}" cy="{}" r="3"/>').format(kind, x, y) for x, y in spots]
    return [*([band] if lows else []), *([line] if spots or not kind else []), *(dots if len(spots) <= 60 else [])]


def _joined(spots: Sequence[Point]) -> str:
    return " ".join(f"{x},{y}" for x, y in spots)


TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
