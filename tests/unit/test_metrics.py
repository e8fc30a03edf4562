"""metrics.jsonl and what is read out of it: lines that are none, clocks that are set, disks that are full."""

import json
from pathlib import Path

import pytest

from farflung.config import Config
from farflung.protocol.messages import Heartbeat
from farflung.queries.cost import Meter
from farflung.store.metrics import Metrics

HOUR, DAY = 3600.0, 86_400.0


class Clocks:
    """A wall clock that people set, and one that nobody does."""

    def __init__(self) -> None:
        self.wall, self.up = 1_700_000_000.0, 50.0

    def pass_time(self, seconds: float) -> None:
        self.wall, self.up = self.wall + seconds, self.up + seconds


def tell(notes: Metrics, clocks: Clocks, started_at: float) -> None:
    beat = Heartbeat(cpu_s=1.0, work_cpu_s=1.0, started_at=started_at)
    notes.note_node("n1", "worker", 1.0, beat, clocks.wall)
    notes.flush(clocks.wall, force=True)


def a_stay(path: Path, clocks: Clocks, jump_s: float, *, ends: bool = True) -> None:
    """A worker that starts after 10 s and is heard for 90, in the middle of which somebody sets the clock."""
    notes = Metrics(path, lambda: clocks.up)
    notes.begin(clocks.wall, is_alone=True)
    clocks.pass_time(10)
    started_at = clocks.wall
    for _ in range(9):
        clocks.pass_time(10)
        tell(notes, clocks, started_at)
        clocks.wall += jump_s / 9
    if ends:
        notes.write("end", clocks.wall)


@pytest.mark.parametrize("jump_s", [0.0, HOUR, -HOUR, DAY, -DAY, 9 * -10.0])
def test_times_and_costs_do_not_move_with_the_wall_clock(tmp_path: Path, jump_s: float) -> None:
    path, clocks, config = tmp_path / "metrics.jsonl", Clocks(), Config()
    a_stay(path, clocks, jump_s)
    cost, _, wall_s = Meter(path, config).read()
    assert wall_s == pytest.approx(100)
    prices = config.prices
    hourly = 90 * prices.worker_usd_per_hour + 100 * prices.coordinator_usd_per_hour
    assert cost == pytest.approx(hourly / HOUR)


@pytest.mark.parametrize("ends", [True, False], ids=["stopped", "killed"])
def test_a_pause_between_two_stays_costs_nothing(tmp_path: Path, ends: bool) -> None:
    path, clocks = tmp_path / "metrics.jsonl", Clocks()
    meter = Meter(path, Config())
    a_stay(path, clocks, 0.0, ends=ends)
    meter.read()
    clocks.pass_time(DAY)
    a_stay(path, clocks, 0.0, ends=ends)
    assert meter.read()[2] == pytest.approx(200)


def test_a_machine_that_began_anew_counts_on(tmp_path: Path) -> None:
    """A coordinator that is started by hand goes on with a stay that the power cut."""
    path, clocks = tmp_path / "metrics.jsonl", Clocks()
    a_stay(path, clocks, 0.0, ends=False)
    clocks.up = 1.0
    notes = Metrics(path, lambda: clocks.up)
    notes.write("sent", clocks.wall, size_bytes=1)
    clocks.pass_time(30)
    notes.write("sent", clocks.wall, size_bytes=1)
    assert Meter(path, Config()).read()[2] == pytest.approx(130)


@pytest.mark.parametrize("jump_s", [HOUR, -HOUR])
def test_lines_of_an_earlier_version_never_count_below_zero(tmp_path: Path, jump_s: float) -> None:
    path, clocks = tmp_path / "metrics.jsonl", Clocks()
    a_stay(path, clocks, jump_s)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "up_s"}) + "\n" for line in lines))
    cost, _, wall_s = Meter(path, Config()).read()
    assert cost >= 0
    assert wall_s >= 0


NOT_LINES = (
    b'{"kind": "node", "at": 5.0, "node": "n1", "ro',
    bytes(300),
    b"\xff\xfe\x80",
    b"12",
    b"null",
    b'"text"',
    b"[]",
    b"{}",
    b'{"kind": "step"}',
    b'{"kind": 3, "at": 1}',
    b'{"kind": "node", "at": 5.0}',
    b'{"kind": "step", "at": 5.0, "step": "x", "weights_bytes": 1}',
    b'{"kind": "sent", "at": NaN, "size_bytes": 1}',
    b'{"kind": "sent", "at": 1' + b"0" * 400 + b', "size_bytes": 1}',
    b'{"kind": "sent", "at": 1, "up_s": "x", "size_bytes": 1}',
    b"[" * 100_000,
    b"\x00\x00\x00{\x00\x00\x00}",
)


@pytest.mark.parametrize("bad", NOT_LINES, ids=lambda bad: repr(bad[:40]))
@pytest.mark.parametrize("is_last", [True, False], ids=["cut", "whole"])
def test_what_is_no_line_is_passed_over_and_takes_no_other_along(tmp_path: Path, bad: bytes, is_last: bool) -> None:
    path, clocks = tmp_path / "metrics.jsonl", Clocks()
    notes, meter = Metrics(path, lambda: clocks.up), Meter(path, Config())
    notes.begin(clocks.wall)
    with path.open("ab") as file:
        file.write(bad + b"\n" * (not is_last))
    meter.read()
    clocks.pass_time(7)
    assert not notes.begin(clocks.wall)
    tell(notes, clocks, clocks.wall)
    notes.write("end", clocks.wall)
    assert [line["kind"] for line in notes.lines()] == ["start", "node", "end"]
    assert meter.read()[2] == pytest.approx(7)
    assert path.read_bytes().count(b"\n") == 4, "the cut line is a line of its own"
