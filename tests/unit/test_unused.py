"""The draw of one rollout of each submission: every one as likely as the other, and the same each time."""

from collections import Counter
from dataclasses import dataclass

from farflung.audits.unused import draw_one_of_each


@dataclass(frozen=True)
class Row:
    group: str
    submission: str
    rollout: str
    step: int = 0


def key_of(step: int) -> bytes:
    return bytes([step]) * 32


def part(number: int, size: int) -> list[Row]:
    return [Row(f"g{number}", f"s{number}", f"r{number}-{sample}") for sample in range(size)]


def test_one_of_each_submission_whatever_its_groups() -> None:
    rows = [
        Row(group, submission, f"{group}{submission}{i}") for group in "ab" for submission in "xy" for i in range(3)
    ]
    drawn = draw_one_of_each(rows, key_of)
    assert [row.submission for row in drawn] == ["x", "y"]
    assert drawn == draw_one_of_each(rows, key_of)
    assert draw_one_of_each([], key_of) == []


def test_every_place_is_drawn_alike() -> None:
    places = Counter(draw_one_of_each(part(n, 4), key_of)[0].rollout[-1] for n in range(4000))
    assert all(900 < count < 1100 for count in places.values()), places


def test_made_up_work_is_paid_for_as_often_as_the_rest_of_it_is_worth() -> None:
    """A quarter honest: what passes, times all of it, comes to the quarter that was computed."""
    honest, size, parts = 2, 8, 4000
    passed = sum(int(draw_one_of_each(part(n, size), key_of)[0].rollout[-1]) < honest for n in range(parts))
    assert abs(passed * size / (parts * honest) - 1) < 0.1
