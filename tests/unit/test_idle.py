"""An owner's preferences: what is set, what is refused and in which words; the watch and the rests."""

import os
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

from farflung.config.hours import duration_s, parse
from farflung.config.idle import IdleSection, changed, preferences_in, read_preferences, write_preferences
from farflung.idle.decide import Decision, Facts, Reason
from farflung.idle.loan import phase
from farflung.idle.lookout import Watch
from farflung.idle.throttle import MOST_S, Throttle
from farflung.ops.preferences import edit, given
from farflung.protocol import wire
from farflung.protocol.errors import ConfigError
from farflung.protocol.messages import Heartbeat

NIGHT = datetime(2026, 12, 1, 23, 30).timestamp()
NOTHING = {"when_idle": False, "lasting": "", "until": "", "hours": "", "share": None, "now_s": NIGHT}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mon-fri 1900", "no span of hours"),
        ("mon-fry 19:00-07:00", "'fry' is no day"),
        ("19:00-19:00", "begins when it ends"),
        ("24:00-07:00", "begins when it ends"),
        ("mon 19:61-20:00", "'19:61' is no time of day"),
        ("mon,,tue", "'' is no span"),
        ("mon19:00-20:00", "no span of hours"),
    ],
)
def test_hours_that_make_no_sense_are_refused_with_their_words(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        changed(IdleSection(), [f"hours={text}"])


def test_hours_of_a_night_belong_to_the_day_on_which_it_begins() -> None:
    found = parse("Fri 22:00-06:00, sun")
    at = {"fri 23": 4 * 1440 + 1380, "sat 5": 5 * 1440 + 300, "sat 7": 5 * 1440 + 420, "sun 12": 6 * 1440 + 720}
    assert {name for name, minute in at.items() if found.has(minute)} == {"fri 23", "sat 5", "sun 12"}
    assert found.minutes_until_open(at["sat 7"]) == 17 * 60
    assert parse("").has(0)


def test_durations_are_said_in_days_hours_minutes_and_seconds() -> None:
    assert [duration_s(text) for text in ("3h", "90m", "1d12h", "45s")] == [10_800, 5400, 129_600, 45]
    for text in ("3", "", "h", "0s", "-3h", "3h3h", "400d", "1.5h"):
        with pytest.raises(ValueError, match="no duration"):
            duration_s(text)


def test_flags_say_only_what_was_said() -> None:
    assert given(**NOTHING).model_fields_set == set()
    assert given(**NOTHING | {"lasting": "3h"}).ends_at == NIGHT + 10_800
    assert given(**NOTHING | {"until": "07:00"}).ends_at == datetime(2026, 12, 2, 7).timestamp()
    assert given(**NOTHING | {"until": "23:45"}).ends_at == NIGHT + 900
    assert given(**NOTHING | {"until": "24:00"}).ends_at == datetime(2026, 12, 2).timestamp()
    assert given(**NOTHING | {"until": "07:00", "lasting": "1h"}).ends_at == NIGHT + 3600
    assert given(**NOTHING | {"when_idle": True, "share": 0.5}).set_values() == {"when_idle": True, "share": 0.5}
    for words, said in (
        ({"share": 0.0}, "share = 0.0"),
        ({"until": "7"}, "--until '7'"),
        ({"lasting": "x"}, "--for 'x'"),
    ):
        with pytest.raises(ConfigError, match=said):
            given(**NOTHING | words)


def test_preferences_are_kept_and_each_fault_is_named(tmp_path: Path) -> None:
    edit(tmp_path, ["programs=steam, Big Game", "user_idle_s=300", "on_battery=true", "hours=sat-sun"])
    found = read_preferences(preferences_in(tmp_path))
    assert found.programs == ("steam", "Big Game")
    assert (found.user_idle_s, found.on_battery, found.hours) == (300, True, "sat-sun")
    edit(tmp_path, ["programs=", "hours=", "on_battery=false"])
    assert read_preferences(preferences_in(tmp_path)).set_values() == {"on_battery": False, "user_idle_s": 300}
    for word, said in (
        ("user_idl_s=3", "unknown key 'user_idl_s'; did you mean 'user_idle_s'"),
        ("user_idle_s=soon", "user_idle_s = 'soon'"),
        ("share=1.5", "share = 1.5"),
        ("hot_c=NaN", "hot_c = nan"),
        ("vacate_s=Infinity", "vacate_s = inf"),
        ("programs=a\x1b[31m", "no name of a program"),
        ("user_idle_s", "write key=value"),
    ):
        with pytest.raises(ConfigError) as caught:
            edit(tmp_path, [word])
        assert said in str(caught.value)
    assert read_preferences(preferences_in(tmp_path)).user_idle_s == 300, "a refused change changes nothing"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"user_idle_s = ", "is not valid TOML"),
        (b"\xff", "is not valid TOML"),
        (b"colour = 1", "unknown key 'colour'"),
        (b"share = 7", "share = 7"),
    ],
)
def test_a_broken_file_of_preferences_is_refused(tmp_path: Path, text: bytes, said: str) -> None:
    preferences_in(tmp_path).write_bytes(text)
    with pytest.raises(ConfigError, match=said):
        read_preferences(preferences_in(tmp_path))


def test_flags_come_before_preferences_also_where_they_say_the_default(tmp_path: Path) -> None:
    stored = IdleSection(share=0.5, hours="sat")
    assert IdleSection(share=1.0).over(stored).set_values() == {"share": 1.0, "hours": "sat"}


def facts(at_s: float = 0.0, **said: float) -> Facts:
    return Facts(at_s, 0.0, 0.0, **said)  # type: ignore[arg-type]


def test_a_watch_follows_the_preferences_and_keeps_the_last_good_ones(tmp_path: Path, caplog) -> None:
    path = preferences_in(tmp_path)
    write_preferences(path, IdleSection(when_idle=True))
    watch = Watch(IdleSection(), path, lambda rules: facts(user_idle_s=60.0))
    watch.poll()
    assert watch.decision == Decision("suspend", Reason.USER_ACTIVE, 120.0)
    path.write_text("share = 9")
    watch.poll()
    assert "share = 9" in caplog.text
    assert watch.decision.reason == Reason.USER_ACTIVE
    write_preferences(path, IdleSection(when_idle=True, user_idle_s=60.0))
    watch.poll()
    assert watch.decision == Decision()
    os.unlink(path)
    watch.poll()
    assert not watch.rules.when_idle


def test_a_look_that_fails_changes_nothing_and_the_next_one_counts(tmp_path: Path, caplog) -> None:
    looks = iter([60.0, None, 999.0])
    seen = threading.Event()

    def read(rules: IdleSection) -> Facts:
        idle_s = next(looks, 999.0)
        if idle_s == 999.0:
            seen.set()
        return facts(user_idle_s=float(idle_s))  # type: ignore[arg-type]

    watch = Watch(IdleSection(when_idle=True, poll_s=0.1), preferences_in(tmp_path), read)
    with watch.watching():
        assert watch.decision.action == "suspend"
        assert seen.wait(5)
        until = time.monotonic() + 5
        while watch.decision.action != "run" and time.monotonic() < until:
            time.sleep(0.01)
    assert watch.decision == Decision()
    assert "the look at this machine failed" in caplog.text


def test_a_machine_that_is_lent_without_conditions_is_not_looked_at(tmp_path: Path) -> None:
    watch = Watch(IdleSection(), preferences_in(tmp_path), lambda rules: pytest.fail("looked"))
    with watch.watching():
        assert watch.decision == Decision()


class Hands:
    """A clock that only work and rest move; no rest is exact."""

    def __init__(self, oversleep: float) -> None:
        self.now, self.rested, self.longest, self._oversleep = 0.0, 0.0, 0.0, oversleep

    def sleep(self, seconds: float) -> None:
        self.longest = max(self.longest, seconds)
        self.rested += seconds * self._oversleep
        self.now += seconds * self._oversleep


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("token_s", [0.001, 0.05])
def test_a_share_of_the_time_is_worked_and_no_rest_is_long(share: float, token_s: float) -> None:
    hands = Hands(1.01)
    throttle = Throttle(lambda: hands.now, hands.sleep)
    hands.now = 100.0  # what was before it began counts for nothing
    throttle.begin()
    for _ in range(2000):
        hands.now += token_s
        throttle.rest(share, lambda: False)
    assert 2000 * token_s / (hands.now - 100.0) == pytest.approx(share, rel=0.03)
    assert hands.longest <= MOST_S


def test_a_stop_ends_a_rest() -> None:
    hands = Hands(1.0)
    throttle = Throttle(lambda: hands.now, hands.sleep)
    throttle.begin()
    hands.now += 5.0
    throttle.rest(0.1, lambda: hands.rested > 1.0)
    assert 1.0 < hands.rested < 1.0 + 2 * MOST_S


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_fits_a_heartbeat(reason: Reason) -> None:
    for action in ("suspend", "vacate"):
        said = phase(Decision(action, reason))  # type: ignore[arg-type]
        assert str(reason) in said
        assert wire.decode(wire.encode(Heartbeat(phase=said)), Heartbeat).phase == said
