"""The run's metrics.jsonl: one JSON object a line, appended as things happen. docs/metrics.md names the fields."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from farflung.protocol.messages import EvalView, Heartbeat, Manifest

NODES_EVERY_S = 2.0


class Metrics:
    """Appends lines. What nodes say of themselves is kept until the next flush; losing it loses only metrics."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._nodes: dict[str, dict[str, Any]] = {}
        self._sent_bytes = 0
        self._flushed_at = 0.0

    def write(self, kind: str, at: float, **fields: Any) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, "at": round(at, 3), **fields}) + "\n")

    def begin(self, at: float) -> bool:
        """Write the line that a stay begins with, unless one is under way; whether it was written."""
        kinds = [line["kind"] for line in self.lines() if line["kind"] in ("start", "end")]
        if kinds and kinds[-1] == "start":
            return False
        self.write("start", at, pid=os.getpid(), commit=commit())
        return True

    def lines(self) -> Iterator[dict[str, Any]]:
        """Every line so far; one that a crash cut short is passed over."""
        for text in self.path.read_text().splitlines() if self.path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(text)

    def note_node(self, node: str, role: str, since: float, beat: Heartbeat, now: float) -> None:
        """A node's own word of its CPU time and pauses."""
        self._nodes[node] = {
            "node": node,
            "role": role,
            "started_at": beat.started_at,
            "cpu_s": beat.cpu_s,
            "work_cpu_s": beat.work_cpu_s,
            "proof_cpu_s": beat.proof_cpu_s,
            "sync_pause_s": beat.sync_pause_s,
            "heard_at": now,
            "registered_at": since,
        }

    def note_step(self, manifest: Manifest, metrics: dict[str, float], now: float) -> None:
        """A committed step."""
        sizes = {"weights_bytes": manifest.full_bytes, "delta_bytes": manifest.delta_bytes}
        self.write("step", now, step=manifest.step, **sizes, **metrics)

    def note_evals(self, views: Iterable[EvalView], now: float) -> None:
        """Evaluations that are through; those that have a line are passed over."""
        noted = {line["step"] for line in self.lines() if line["kind"] == "eval"}
        for view in views:
            if view.step not in noted:
                self.write("eval", now, **msgspec.to_builtins(view))

    def count_sent(self, size_bytes: int) -> None:
        """Bytes of weights that left here."""
        self._sent_bytes += size_bytes

    def flush(self, now: float, *, force: bool = False) -> None:
        """Write what was noted since, every few seconds."""
        if not force and now - self._flushed_at < NODES_EVERY_S:
            return
        nodes, self._nodes = self._nodes, {}  # swapped first: another thread may note one meanwhile
        sent_bytes, self._sent_bytes, self._flushed_at = self._sent_bytes, 0, now
        for fields in nodes.values():
            self.write("node", now, **fields)
        if sent_bytes:
            self.write("sent", now, size_bytes=sent_bytes)


def commit() -> str:
    """The git commit that runs, or the version where there is no git."""
    from importlib.metadata import version

    folder = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return version("farflung")
    return found.stdout.strip()
