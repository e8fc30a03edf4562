"""When a node may work: no reason is ever missing, and nothing flutters, whatever an owner does."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from farflung.config.hours import DAYS, WEEK_MINUTES, parse
from farflung.config.idle import IdleSection
from farflung.idle.decide import AT_ONCE, Facts, Reason, State, holding, step

SECONDS = st.floats(0, 900)
PERCENT = st.floats(0, 100)
RULES = st.builds(
    IdleSection,
    when_idle=st.booleans(),
    is_paused=st.booleans(),
    user_idle_s=SECONDS,
    cpu_percent=st.floats(1, 100),
    gpu_percent=st.floats(1, 100),
    busy_s=st.floats(0, 20),
    quiet_s=st.floats(0, 60),
    program_gone_s=st.floats(0, 60),
    on_battery=st.booleans(),
    on_metered=st.booleans(),
    hot_c=st.floats(0, 100),
    cool_s=SECONDS,
    hours=st.sampled_from(["", "mon-fri 19:00-07:00", "sat-sun", "tue 09:00-17:00, fri-mon 22:00-06:00"]),
    vacate_s=SECONDS,
    ends_at=st.one_of(st.just(0.0), st.floats(0, 2e4)),
)
MOMENT = st.builds(
    Facts,
    at_s=st.floats(0.1, 60),  # since the one before
    unix_s=st.just(0.0),
    minute_of_week=st.floats(0, WEEK_MINUTES, exclude_max=True),
    user_idle_s=st.none() | st.floats(0, 2000),
    cpu_percent=st.none() | PERCENT,
    gpu_percent=st.none() | PERCENT,
    running=st.none() | st.sampled_from([frozenset(), frozenset({"game"})]),
    is_on_battery=st.none() | st.booleans(),
    temperature_c=st.none() | st.floats(20, 110),
    is_metered=st.none() | st.booleans(),
)
NOTHING = frozenset[Reason]()


def lives(rules: IdleSection, moments: list[Facts]) -> list[tuple[Facts, set[Reason], State]]:
    """Each moment at its time, the reasons that are given then, and the state after."""
    found, state, at_s = list[tuple[Facts, set[Reason], State]](), State(), 1000.0
    for moment in moments:
        at_s += moment.at_s
        facts = replace(moment, at_s=at_s, unix_s=at_s)
        held = holding(rules, state, facts)
        state = step(rules, state, facts)
        found.append((facts, held, state))
    return found


@given(RULES, st.lists(MOMENT, min_size=1, max_size=40))
def test_a_node_that_does_not_work_says_why_and_one_that_works_has_no_reason(rules, moments) -> None:
    for _, _, state in lives(rules, moments):
        decision = state.decision
        assert (decision.action == "run") == (decision.reason is None)
        assert decision.action != "run" or decision.resumes_in_s is None
        assert decision.resumes_in_s is None or decision.resumes_in_s >= 0


@given(RULES, st.lists(MOMENT, min_size=1, max_size=40))
def test_what_holds_long_enough_is_never_worked_through(rules, moments) -> None:
    since: dict[Reason, float] = {}
    for facts, held, state in lives(rules, moments):
        since = {reason: since.get(reason, facts.at_s) for reason in held}
        for reason, began_s in since.items():
            waits_s = rules.busy_s if reason in (Reason.CPU_BUSY, Reason.GPU_BUSY) else 0.0
            if facts.at_s - began_s >= waits_s:
                assert state.decision.action != "run", reason
                assert state.signs[reason].counts


@given(RULES, st.lists(MOMENT, min_size=1, max_size=40))
def test_nothing_resumes_before_its_reason_was_gone_long_enough(rules, moments) -> None:
    gone_s = {
        Reason.CPU_BUSY: rules.quiet_s,
        Reason.GPU_BUSY: rules.quiet_s,
        Reason.EXCLUSIVE_PROGRAM: rules.program_gone_s,
        Reason.TOO_HOT: rules.cool_s,
    }
    seen: dict[Reason, float] = {}
    was = "run"
    for facts, held, state in lives(rules, moments):
        if was != "run" and state.decision.action == "run":
            assert not held or all(not state.signs[reason].counts for reason in held)
            assert all(facts.at_s - seen[reason] >= gone_s.get(reason, 0.0) - 1e-9 for reason in seen)
        seen |= {reason: facts.at_s for reason in held if state.signs[reason].counts}
        seen = seen if state.decision.action != "run" else {}
        was = state.decision.action


@given(RULES, st.lists(MOMENT, min_size=1, max_size=40))
def test_memory_is_given_back_late_or_for_what_lasts_and_stays_so_until_work_goes_on(rules, moments) -> None:
    away_s, was = 0.0, "run"
    for facts, _, state in lives(rules, moments):
        action = state.decision.action
        away_s = facts.at_s if was == "run" else away_s
        counted = {reason for reason, sign in state.signs.items() if sign.counts}
        is_due = facts.at_s - away_s >= rules.vacate_s or bool(counted & AT_ONCE)
        assert action == ("run" if not counted else "vacate" if is_due or was == "vacate" else "suspend")
        was = action


@given(RULES, st.lists(MOMENT, min_size=1, max_size=20))
def test_a_look_without_time_between_changes_nothing(rules, moments) -> None:
    facts, _, state = lives(rules, moments)[-1]
    again = step(rules, state, facts)
    assert (again.decision, again.away_since_s) == (state.decision, state.away_since_s)


@given(RULES, st.lists(MOMENT, min_size=1, max_size=20), st.floats(0.01, 0.99))
def test_it_resumes_when_it_said_and_no_sooner(rules, moments, part) -> None:
    """If nothing comes meanwhile: nobody touches it, and what waited for time alone goes on."""
    facts, _, state = lives(rules, moments)[-1]
    wait_s = state.decision.resumes_in_s
    if wait_s is None or rules.ends_at:
        return
    for passed_s, is_due in ((wait_s * part, False), (wait_s + 1e-3, True)):
        later = replace(
            facts,
            at_s=facts.at_s + passed_s,
            minute_of_week=(facts.minute_of_week + passed_s / 60) % WEEK_MINUTES,
            user_idle_s=None if facts.user_idle_s is None else facts.user_idle_s + passed_s,
        )
        if is_due:
            later = replace(later, cpu_percent=None, gpu_percent=None)
            leaves_hours = not rules.open_hours.has(later.minute_of_week)
            assert step(rules, state, later).decision.action == "run" or leaves_hours
        elif wait_s > 1:
            assert step(rules, state, later).decision.action != "run"


@given(st.lists(MOMENT, min_size=1, max_size=20))
def test_a_machine_that_tells_nothing_works(moments) -> None:
    silent = [Facts(moment.at_s, 0.0, moment.minute_of_week) for moment in moments]
    assert all(state.decision.action == "run" for _, _, state in lives(IdleSection(when_idle=True), silent))


TIME = st.tuples(st.integers(0, 23), st.integers(0, 59))


@given(st.integers(0, 6), st.integers(0, 6), TIME, TIME, st.floats(0, WEEK_MINUTES, exclude_max=True))
def test_hours_are_those_of_each_day_named_and_the_wait_for_them_is_right(first, last, start, end, minute) -> None:
    if start == end:
        return
    text = f"{DAYS[first]}-{DAYS[last]} {start[0]:02}:{start[1]:02}-{end[0]:02}:{end[1]:02}"
    found, begins, ends = parse(text), start[0] * 60 + start[1], end[0] * 60 + end[1]
    named = {(first + n) % 7 for n in range((last - first) % 7 + 1)}
    day, of_day = divmod(minute, 24 * 60)
    if begins < ends:
        is_open = day in named and begins <= of_day < ends
    else:
        is_open = (day in named and of_day >= begins) or ((day - 1) % 7 in named and of_day < ends)
    assert found.has(minute) == is_open
    wait = found.minutes_until_open(minute)
    assert (wait == 0) == is_open
    assert found.has((minute + wait + 1e-6) % WEEK_MINUTES)
    assert is_open or not found.has((minute + wait * 0.999) % WEEK_MINUTES) or wait < 1e-3
