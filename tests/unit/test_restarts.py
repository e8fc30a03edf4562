"""Which roles that ended are started again, and what is said where none is."""

import signal
from pathlib import Path

import pytest

from farflung.launch.logs import LogWarnings, last_words
from farflung.launch.restarts import MOST, REFUSED, Restarts, killed_by

LINE = "2026-01-02 03:04:05,678"


def test_a_role_that_ends_three_times_the_same_way_is_not_started_again() -> None:
    restarts = Restarts()
    for number in (1, 2):
        assert not restarts.refuse("trainer", 1, f"IndexError: index {number} is out of range", 30.0)
    why = restarts.refuse("trainer", 1, "IndexError: index 77 is out of range", 30.0)
    assert why == "trainer ended 3 times the same way, with 1: IndexError: index 77 is out of range"


@pytest.mark.parametrize(
    ("ends", "is_again"),
    [
        ([(1, "a", 1.0), (1, "b", 1.0), (1, "a", 1.0), (1, "b", 1.0)], True),
        ([(1, "a", 1.0), (2, "a", 1.0), (1, "a", 1.0)], True),
        ([(1, "a", 9999.0)] * 5, True),
        ([(1, "a", 60.0)] * 3, False),
        ([(-9, "a", 60.0)] * 5, True),
        ([(-9, "a", 2.0)] * 3, False),
    ],
    ids=["other words", "other codes", "after long lives", "after short ones", "killed now and then", "killed at once"],
)
def test_only_the_same_end_in_a_row_counts(ends, is_again) -> None:
    restarts = Restarts()
    assert [not restarts.refuse("x", *end) for end in ends][-1] is is_again


def test_a_wrong_configuration_is_refused_at_once_in_its_own_words() -> None:
    assert Restarts().refuse("trainer", REFUSED, "learn.lora_rank is 8", 1.0) == "learn.lora_rank is 8"


def test_there_is_an_end_to_restarts_of_any_kind() -> None:
    restarts = Restarts()
    said = [restarts.refuse("x", number % 5 + 1, "", 1.0) for number in range(MOST + 1)]
    assert said[-2:] == ["", f"x ended {MOST + 1} times, the last time with 1: without a word"]


@pytest.mark.parametrize("code", [-signal.SIGKILL, -signal.SIGSEGV, -63])
def test_a_signal_is_named(code: int) -> None:
    assert "killed by" in killed_by(code)
    assert ("memory" in killed_by(code)) is (code == -signal.SIGKILL)


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (b"", ""),
        (b"one\nfarflung: x is wrong; do y\n", "x is wrong; do y"),
        (b"Traceback (most recent call last):\n  File\nValueError: no\nmore\n", "ValueError: no"),
        (
            b"Traceback (most recent call last):\n  a\nKeyError: 1\n\nDuring handling:\n\n"
            b"Traceback (most recent call last):\n  b\nsqlalchemy.exc.DatabaseError: damaged\n[SQL]\n(Background: x)\n",
            "sqlalchemy.exc.DatabaseError: damaged",
        ),
        (b"\xff\x00\x1b[2J", rb"\ufffd".decode("unicode_escape") + r"\x00\x1b[2J"),
    ],
)
def test_the_last_words_are_a_sentence_or_an_exception(tmp_path: Path, log: bytes, words: str) -> None:
    path = tmp_path / "trainer.log"
    path.write_bytes(b"farflung: of an earlier life\n" + log)
    assert last_words(path, since=len(b"farflung: of an earlier life\n")) == words
    assert last_words(tmp_path / "absent.log") == ""


def test_warnings_and_errors_of_all_logs_are_told_once(tmp_path: Path) -> None:
    log = tmp_path / "scorer.log"
    log.write_text(f"{LINE} ERROR farflung.scorer of an earlier run\n")
    warnings = LogWarnings(tmp_path)
    with log.open("a") as file:
        file.write(f"{LINE} INFO farflung.scorer all is well\n{LINE} ERROR farflung.scorer no score because=x\n")
        file.write(f"{LINE} WARNING farflung.scorer half a li")
    (tmp_path / "trainer.log").write_text(f"Traceback\n{LINE} WARNING farflung.room no room for weights\n")
    assert list(warnings.poll()) == [("scorer", "no score because=x"), ("trainer", "no room for weights")]
    with log.open("a") as file:
        file.write("ne\n")
    assert list(warnings.poll()) == [("scorer", "half a line")]
