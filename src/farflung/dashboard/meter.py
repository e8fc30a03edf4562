"""What a run's metrics.jsonl says of time and money, as it grows: cost and verification overhead so far."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from farflung.config import Config
from farflung.store.metrics import Tail

Line = dict[str, Any]
Process = tuple[str, float]
"""A node and when its process started."""


def last_per_process(lines: Iterable[Line]) -> dict[Process, Line]:
    """The last heartbeat's figures of every process that ever was."""
    return {(line["node"], line["started_at"]): line for line in lines if line["kind"] == "node"}


def cost_usd(lives: Iterable[Line], wall_s: float, config: Config) -> float:
    """Process-hours times prices; a process lives from its start to its last heartbeat, the coordinator all along."""
    prices = config.prices
    hourly = {
        "worker": prices.worker_usd_per_hour,
        "trainer": prices.trainer_usd_per_hour,
        "validator": prices.validator_usd_per_hour,
    }
    paid = sum((line["heard_at"] - line["started_at"]) * hourly.get(line["role"], 0.0) for line in lives)
    return (paid + wall_s * prices.coordinator_usd_per_hour) / 3600


def overhead(lives: Iterable[Line]) -> float | None:
    """CPU-seconds of replay, and of proof on workers, over those of generation; None before the first."""
    work: dict[str, float] = defaultdict(float)
    for line in lives:
        work[line["role"]] += line["work_cpu_s"]
        work["proof"] += line["proof_cpu_s"]
    return (work["validator"] + work["proof"]) / work["worker"] if work["worker"] > 0 else None


class Meter:
    """Follows the file: each look reads only what was appended since the last one."""

    def __init__(self, path: Path, config: Config) -> None:
        self._tail, self._config = Tail(path), config
        self._lives: dict[Process, Line] = {}
        self._past_s, self._since, self._last = 0.0, 0.0, 0.0

    def look(self) -> tuple[float, float | None, float]:
        """Cost in USD, verification overhead and seconds of work so far, pauses between stop and resume left out."""
        if self._tail.begins_anew():
            self._lives, self._past_s, self._since, self._last = {}, 0.0, 0.0, 0.0
        for line in self._tail.lines():
            self._take(line)
        lives = self._lives.values()
        wall_s = self._past_s + (self._last - self._since if self._since else 0.0)
        return cost_usd(lives, wall_s, self._config), overhead(lives), wall_s

    def _take(self, line: Line) -> None:
        self._last = line["at"]
        self._lives |= last_per_process([line])
        if line["kind"] == "end" and self._since:
            self._past_s, self._since = self._past_s + line["at"] - self._since, 0.0
        elif not self._since and line["kind"] != "end":
            self._since = line["at"]
