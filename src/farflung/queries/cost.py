"""Cost and verification overhead of a run so far, read from metrics.jsonl as it grows."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from farflung.config import Config, PricesSection
from farflung.store.metrics import Tail

Line = dict[str, Any]
Process = tuple[str, float]
"""A node and when its process started."""


def process_of(line: Line) -> Process:
    """Whose line it is."""
    return line["node"], line["started_at"]


def last_per_process(lines: Iterable[Line]) -> dict[Process, Line]:
    """The last heartbeat's figures of every process that ever was."""
    return {process_of(line): line for line in lines if line["kind"] == "node"}


class Worked:
    """Seconds of work, line by line: pauses between stays left out, and never back.

    Lines with `up_s` are told apart by the clock that is never set; between others the wall clock may have been set.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.lived_s: dict[Process, float] = {}
        """Seconds that each process lived, from its start to its last line."""
        self._base: Line | None = None
        """The line that the seconds beyond `_past_s` are counted from: the stay's first."""
        self._past_s = self._up_s = 0.0
        self._began_s: dict[Process, float] = {}

    def take(self, line: Line) -> None:
        """One more line."""
        kind, up_s = line["kind"], line.get("up_s", 0.0)
        if self._base is None or kind == "start" or up_s < self._up_s:  # the machine itself began anew
            self._base, self._past_s = line, self.seconds
        self._up_s = up_s
        self.seconds = max(self.seconds, self._past_s + _between(self._base, line))
        if kind == "end":
            self._base = None
        elif kind == "node":
            self._take_node(process_of(line), line)

    def _take_node(self, process: Process, line: Line) -> None:
        """A process begins before its first line, by as much as it says, but not before the work did."""
        if process not in self._began_s:
            head_s = min(max(0.0, line["heard_at"] - line["started_at"]), self.seconds)
            self._began_s[process] = self.seconds - head_s
        self.lived_s[process] = self.seconds - self._began_s[process]


def _between(before: Line, after: Line) -> float:
    clock = "up_s" if "up_s" in before and "up_s" in after else "at"
    return after[clock] - before[clock]


def cost_usd(lives: Iterable[tuple[str, float]], wall_s: float, config: Config) -> float:
    """Process-hours times prices: of processes by role and seconds, and of the coordinator all along."""
    prices = config.prices
    hourly = {
        "worker": prices.worker_usd_per_hour,
        "trainer": prices.trainer_usd_per_hour,
        "validator": prices.validator_usd_per_hour,
    }
    paid = sum(seconds * hourly.get(role, 0.0) for role, seconds in lives)
    return (paid + wall_s * prices.coordinator_usd_per_hour) / 3600


def used(line: Line, kind: Literal["work", "proof"], prices: PricesSection, since: Line | None = None) -> float:
    """What a process used for its work or for proof, since an earlier line of it if one is given, in seconds of a core
    (`PricesSection.core_s`)."""
    clocks = [f"{kind}_{clock}" for clock in ("cpu_s", "device_s")]
    return prices.core_s(*(line.get(clock, 0.0) - (since or {}).get(clock, 0.0) for clock in clocks))


def overhead(lives: Iterable[Line], prices: PricesSection) -> float | None:
    """What replay used, and proof on workers, over what generation did; None before the first."""
    work: dict[str, float] = defaultdict(float)
    for line in lives:
        work[line["role"]] += used(line, "work", prices)
        work["proof"] += used(line, "proof", prices)
    return (work["validator"] + work["proof"]) / work["worker"] if work["worker"] > 0 else None


class Meter:
    """Follows the file: each look reads only what was appended since the last one."""

    def __init__(self, path: Path, config: Config) -> None:
        self._tail, self._config = Tail(path), config
        self._lives: dict[Process, Line] = {}
        self._worked = Worked()

    def read(self) -> tuple[float, float | None, float]:
        """Cost in USD, verification overhead and seconds of work so far, pauses between stop and resume left out."""
        if self._tail.begins_anew():
            self._lives, self._worked = {}, Worked()
        for line in self._tail.lines():
            self._worked.take(line)
            self._lives |= last_per_process([line])
        lives = [(line["role"], self._worked.lived_s[process]) for process, line in self._lives.items()]
        wall_s = self._worked.seconds
        return cost_usd(lives, wall_s, self._config), overhead(self._lives.values(), self._config.prices), wall_s
