"""`farflung idle`: an owner's preferences, shown and changed, and what this machine would do by them at this moment."""

import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from farflung.config.hours import duration_s, minute_of_day
from farflung.config.idle import IdleSection, changed, parse, preferences_in, read_preferences, write_preferences
from farflung.idle.decide import Facts, State, step
from farflung.idle.sensors import NAMES, Sensors
from farflung.protocol.errors import ConfigError

SPAN_S = 1.0
"""Load is measured over this."""


def given(*, when_idle: bool, lasting: str, until: str, hours: str, share: float | None, now_s: float) -> IdleSection:
    """What flags of `farflung join` set; the rest is left to the preferences. Raises ConfigError."""
    ends = [_ends_at("--for", lasting, now_s), _ends_at("--until", until, now_s)]
    tree: dict[str, Any] = {"hours": hours} if hours else {}
    tree |= {"when_idle": True} if when_idle else {}
    tree |= {"share": share} if share is not None else {}
    tree |= {"ends_at": min(at for at in ends if at)} if any(ends) else {}
    return parse(tree, "--")


def _ends_at(flag: str, text: str, now_s: float) -> float:
    """Unix time, 0 where nothing is said."""
    try:
        if not text:
            return 0.0
        return now_s + duration_s(text) if flag == "--for" else _next(minute_of_day(text), now_s)
    except ValueError as error:
        raise ConfigError(f"{flag} {error}") from error


def _next(minute: int, now_s: float) -> float:
    """When the local clock shows this time next."""
    now = datetime.fromtimestamp(now_s)
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    hour, minute = divmod(minute, 60)
    days = (midnight + timedelta(days=day) for day in range(3))
    times = (day + timedelta(days=hour // 24) for day in days)
    return next(at for day in times if (at := day.replace(hour=hour % 24, minute=minute).timestamp()) > now_s)


def edit(folder: Path, words: Sequence[str]) -> str:
    """Change the preferences of the node in a folder; gives what to say. Raises ConfigError."""
    path = preferences_in(folder)
    if not words:
        raise ConfigError("nothing to set; write key=value, such as user_idle_s=300, or key= for its default")
    write_preferences(path, changed(read_preferences(path), words))
    return f"{path}: {', '.join(words)}; a node that is lent by these preferences follows within seconds"


def show(folder: Path) -> str:
    """All preferences, and what would be decided by them here and now."""
    path = preferences_in(folder)
    rules = read_preferences(path)
    told = "" if path.exists() else "; it is not there yet"
    return "\n".join([f"preferences in {path}{told}", "", *_settings(rules), "", *observe(rules)])


def _settings(rules: IdleSection) -> Iterator[str]:
    for name, field in IdleSection.model_fields.items():
        mark = "*" if name in rules.model_fields_set else " "
        yield f"{mark} {name:<15} {_word(getattr(rules, name)):<12} {field.description}"
    yield "* was set; the others have their defaults"


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else ",".join(value) if isinstance(value, tuple) else value


def observe(rules: IdleSection) -> Iterator[str]:
    """What this machine tells, what it does not, and the decision of a node with `--when-idle`."""
    sensors = Sensors()
    at_once = rules.model_copy(update={"when_idle": True, "busy_s": 0.0})
    time.sleep(SPAN_S)
    facts = sensors.read(at_once)
    sensors.close()
    yield f"now: {', '.join(_facts(facts)) or 'nothing is told here'}"
    for name, one in sensors.missing.items():
        yield f"not seen: {NAMES[name]} ({one.why}){'; ' + one.mend if one.mend else ''}"
    decision = step(at_once, State(), facts).decision
    wait = "" if decision.resumes_in_s is None else f", for {decision.resumes_in_s:,.0f} s as it seems"
    yield f"with --when-idle it would {decision.action}{f' ({decision.reason}){wait}' if decision.reason else ''}"


def _facts(facts: Facts) -> Iterator[str]:
    if facts.user_idle_s is not None:
        yield f"the last key or mouse move was {facts.user_idle_s:,.0f} s ago"
    if facts.cpu_percent is not None:
        yield f"others use {facts.cpu_percent:.0f} % of all cores"
    if facts.gpu_percent is not None:
        yield f"others use {facts.gpu_percent:.0f} % of a GPU"
    if facts.running:
        yield f"{', '.join(sorted(facts.running))} runs"
    if facts.is_on_battery is not None:
        yield "on battery" if facts.is_on_battery else "on mains"
    if facts.temperature_c is not None:
        yield f"{facts.temperature_c:.0f} °C"
    if facts.is_metered is not None:
        yield f"the network is {'' if facts.is_metered else 'not '}metered"
