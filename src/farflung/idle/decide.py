"""Whether a node may work: facts about the machine in, `run`, `suspend` or `vacate` out. No clock, nothing read.

A sign counts once it has held for a while, and holds the node back until it has been gone for a while; both times are
the owner's. The figures of 3 minutes, 25 percent, 20 and 15 seconds are BOINC's defaults (lib/prefs.cpp), the 10
minutes until memory is given back HTCondor's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal

from farflung.config.idle import IdleSection

Action = Literal["run", "suspend", "vacate"]
LESS = 0.8
"""Others must use this share of their limit or less to count as quiet again."""
COOLER_C = 5.0
"""A hot processor must be cooler than its limit by this."""


class Reason(StrEnum):
    """Why a node does not work; where several hold, the first of this list is told."""

    TIME_IS_UP = "time_is_up"
    PAUSED = "paused"
    OUTSIDE_HOURS = "outside_hours"
    EXCLUSIVE_PROGRAM = "exclusive_program"
    USER_ACTIVE = "user_active"
    ON_BATTERY = "on_battery"
    TOO_HOT = "too_hot"
    METERED_NETWORK = "metered_network"
    GPU_BUSY = "gpu_busy"
    CPU_BUSY = "cpu_busy"


AT_ONCE = frozenset({Reason.TIME_IS_UP, Reason.OUTSIDE_HOURS, Reason.EXCLUSIVE_PROGRAM})
"""For these the memory is given back at once: they last, or want it."""


@dataclass(frozen=True)
class Facts:
    """What is so at one moment; None where the machine has nothing that tells it."""

    at_s: float
    """By a clock that never goes back."""
    unix_s: float
    minute_of_week: float
    """In local time, from Monday 00:00."""
    user_idle_s: float | None = None
    cpu_percent: float | None = None
    """Of all cores, what other programs use."""
    gpu_percent: float | None = None
    running: frozenset[str] | None = None
    """Those of the owner's programs that run."""
    is_on_battery: bool | None = None
    temperature_c: float | None = None
    is_metered: bool | None = None


@dataclass(frozen=True)
class Decision:
    """What a node does, and why."""

    action: Action = "run"
    reason: Reason | None = None
    """None where it runs, and only there."""
    resumes_in_s: float | None = None
    """After which it would run if nothing else came; None where that is not known."""


@dataclass(frozen=True)
class Sign:
    """One reason, from when it was first seen until it has been gone long enough."""

    since_s: float
    seen_s: float
    holds: bool
    counts: bool


@dataclass(frozen=True)
class State:
    """A decision, and what the next one needs to know."""

    decision: Decision = Decision()
    away_since_s: float = 0.0
    signs: Mapping[Reason, Sign] = field(default_factory=dict[Reason, Sign])


def step(rules: IdleSection, state: State, facts: Facts) -> State:
    """The next decision."""
    held = holding(rules, state, facts)
    signs = {
        reason: sign
        for reason in Reason
        if (sign := _sign(rules, reason, state.signs.get(reason), reason in held, facts.at_s))
    }
    counted = {reason: sign for reason, sign in signs.items() if sign.counts}
    if not counted:
        return State(signs=signs)
    away_since_s = facts.at_s if state.decision.action == "run" else state.away_since_s
    is_long = facts.at_s - away_since_s >= rules.vacate_s
    is_vacated = state.decision.action == "vacate" or is_long or not AT_ONCE.isdisjoint(counted)
    waits = [_resumes_in_s(rules, reason, sign, facts) for reason, sign in counted.items()]
    known = [wait for wait in waits if wait is not None]
    resumes_in_s = max(known) if len(known) == len(waits) else None
    decision = Decision("vacate" if is_vacated else "suspend", next(iter(counted)), resumes_in_s)
    return State(decision, away_since_s, signs)


def holding(rules: IdleSection, state: State, facts: Facts) -> set[Reason]:
    """The reasons that are given at this moment, however short."""
    found = {
        Reason.TIME_IS_UP: 0 < rules.ends_at <= facts.unix_s,
        Reason.PAUSED: rules.is_paused,
        Reason.OUTSIDE_HOURS: not rules.open_hours.has(facts.minute_of_week),
    }
    if rules.when_idle:
        found |= _of_owner(rules, facts)
        found |= {
            Reason.TOO_HOT: _is_hot(rules, facts, _counts(state, Reason.TOO_HOT)),
            Reason.CPU_BUSY: _is_busy(facts.cpu_percent, rules.cpu_percent, _counts(state, Reason.CPU_BUSY)),
            Reason.GPU_BUSY: _is_busy(facts.gpu_percent, rules.gpu_percent, _counts(state, Reason.GPU_BUSY)),
        }
    return {reason for reason, is_given in found.items() if is_given}


def _of_owner(rules: IdleSection, facts: Facts) -> dict[Reason, bool]:
    return {
        Reason.EXCLUSIVE_PROGRAM: bool(facts.running),
        Reason.USER_ACTIVE: facts.user_idle_s is not None and facts.user_idle_s < rules.user_idle_s,
        Reason.ON_BATTERY: bool(facts.is_on_battery) and not rules.on_battery,
        Reason.METERED_NETWORK: bool(facts.is_metered) and not rules.on_metered,
    }


def _counts(state: State, reason: Reason) -> bool:
    return reason in state.signs and state.signs[reason].counts


def _is_busy(percent: float | None, limit: float, was_busy: bool) -> bool:
    return percent is not None and limit < 100 and percent > limit * (LESS if was_busy else 1.0)


def _is_hot(rules: IdleSection, facts: Facts, was_hot: bool) -> bool:
    limit = rules.hot_c - (COOLER_C if was_hot else 0.0)
    return facts.temperature_c is not None and rules.hot_c > 0 and facts.temperature_c > limit


def _sign(rules: IdleSection, reason: Reason, before: Sign | None, holds: bool, at_s: float) -> Sign | None:
    """The sign of a reason at this moment; None once it is gone."""
    if holds:
        since_s = before.since_s if before and before.holds else at_s
        counts = bool(before and before.counts) or at_s - since_s >= _after_s(rules, reason)
        return Sign(since_s, at_s, holds=True, counts=counts)
    if before and before.counts and at_s - before.seen_s < _gone_s(rules, reason):
        return replace(before, holds=False)
    return None


def _after_s(rules: IdleSection, reason: Reason) -> float:
    """How long a reason must hold to count."""
    return rules.busy_s if reason in (Reason.CPU_BUSY, Reason.GPU_BUSY) else 0.0


def _gone_s(rules: IdleSection, reason: Reason) -> float:
    """How long it must then be gone."""
    return {
        Reason.CPU_BUSY: rules.quiet_s,
        Reason.GPU_BUSY: rules.quiet_s,
        Reason.EXCLUSIVE_PROGRAM: rules.program_gone_s,
        Reason.TOO_HOT: rules.cool_s,
    }.get(reason, 0.0)


def _resumes_in_s(rules: IdleSection, reason: Reason, sign: Sign, facts: Facts) -> float | None:
    if not sign.holds:
        return max(0.0, sign.seen_s + _gone_s(rules, reason) - facts.at_s)
    if reason == Reason.USER_ACTIVE:
        return rules.user_idle_s - (facts.user_idle_s or 0.0)
    if reason == Reason.OUTSIDE_HOURS:
        return 60 * rules.open_hours.minutes_until_open(facts.minute_of_week)
    return None
