"""The run's metrics.jsonl: one JSON object a line, appended as things happen. docs/metrics.md names the fields."""

import contextlib
import json
import os
import subprocess
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import msgspec

from farflung.protocol.messages import EvalView, Heartbeat, Manifest

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

NODES_EVERY_S = 2.0
NODES_AT_ONCE = 8
"""Most nodes that get a line in one flush: 4 lines a second however many there are, some 100 MB a day."""
MOST_BYTES = 256 << 20
"""A larger file is thinned."""
WORDS = ("kind", "node", "role", "name")
NEEDED = {
    "node": ("node", "role", "started_at", "heard_at", "cpu_s", "work_cpu_s", "proof_cpu_s", "sync_pause_s"),
    "step": ("step", "weights_bytes"),
    "drawn": ("step",),
    "eval": ("step",),
    "sent": ("size_bytes",),
    "kill": ("name", "node"),
    "restart": ("name",),
}
"""Fields that readers rely on."""


class Tail:
    """Follows the file line by line: each look reads only what was appended since the last one."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._whose = path, 0, -1

    def begins_anew(self) -> bool:
        """Whether this is the first look, or the file was thinned since and is read from its beginning."""
        whose = self._path.stat().st_ino if self._path.exists() else -1
        if whose == self._whose:
            return False
        self._whose, self._offset = whose, 0
        return True

    def lines(self, part: bytes = b"") -> Iterator[dict[str, Any]]:
        """Lines appended since, of those with this part in them; one that is not whole yet waits for the next look.

        A line that is none of ours, cut short by a crash or damaged on its disk, is passed over.
        """
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for text in file:
                if not text.endswith(b"\n"):
                    return
                self._offset += len(text)
                if part in text and (line := parse(text)) is not None:
                    yield line


def parse(text: bytes) -> dict[str, Any] | None:
    """A line as its fields, or None where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    line = cast(dict[str, Any], found)
    needed = ("kind", "at", *NEEDED.get(str(line.get("kind")), ()))
    is_well = all(_is_well(name, line.get(name)) for name in needed) and _is_well("up_s", line.get("up_s", 0))
    return line if is_well else None


def _is_well(name: str, value: Any) -> bool:
    if name in WORDS:
        return isinstance(value, str)
    return isinstance(value, int | float) and abs(value) < 1e18  # NaN is not


class Metrics:
    """Appends lines. Nodes' figures of themselves are kept until the next flush; losing them loses only metrics."""

    def __init__(self, path: Path, uptime: Callable[[], float] | None = None) -> None:
        """`uptime` is a clock that is never set, the same for all processes of this machine; readers need none."""
        self.path, self._uptime = path, uptime
        self._nodes: OrderedDict[tuple[str, int], dict[str, Any]] = OrderedDict()
        """Nodes' figures since their last line, those first that have waited longest for one."""
        self._evals, self._tail = set[int](), Tail(path)
        """Steps whose evaluation has a line, as far as the file was read."""
        self._sent_bytes = 0
        self._flushed_at = 0.0

    def write(self, kind: str, at: float, **fields: Any) -> None:
        """Append one line."""
        with self._appending() as file:
            up = {} if self._uptime is None else {"up_s": round(self._uptime(), 3)}
            file.write(json.dumps({"kind": kind, "at": round(at, 3), **up, **fields}).encode() + b"\n")

    @contextlib.contextmanager
    def _appending(self) -> Generator[IO[bytes]]:
        """The file, locked against a process that thins it; opened again if that one has just put another in place.

        It stands at the beginning of a line, even where a crash or a full disk cut the last one.
        """
        while True:
            with self.path.open("ab+") as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX)
                if os.fstat(file.fileno()).st_ino == self.path.stat().st_ino:
                    size = file.seek(0, os.SEEK_END)
                    if size and (file.seek(size - 1), file.read(1))[1] != b"\n":
                        file.write(b"\n")
                    yield file
                    return

    def begin(self, at: float, *, is_alone: bool = False) -> bool:
        """Write the line that a stay begins with, unless one is under way; whether it was written.

        Where the writer `is_alone`, a stay that is under way was cut short by a crash, and the next one begins.
        """
        kinds = [line["kind"] for line in self.lines() if line["kind"] in ("start", "end")]
        if kinds and kinds[-1] == "start" and not is_alone:
            return False
        self.write("start", at, pid=os.getpid(), commit=commit())
        return True

    def lines(self) -> Iterator[dict[str, Any]]:
        """Every line so far; one that a crash cut short is passed over."""
        yield from Tail(self.path).lines()

    def note_node(self, node: str, role: str, since: float, heartbeat: Heartbeat, now: float) -> None:
        """A node's own word of its pauses, and of the time that its processor and accelerators worked."""
        self._nodes[node, heartbeat.device] = {
            "node": node,
            "role": role,
            "started_at": heartbeat.started_at,
            "cpu_s": heartbeat.cpu_s,
            "work_cpu_s": heartbeat.work_cpu_s,
            "proof_cpu_s": heartbeat.proof_cpu_s,
            "work_device_s": heartbeat.work_device_s,
            "proof_device_s": heartbeat.proof_device_s,
            "sync_pause_s": heartbeat.sync_pause_s,
            "heard_at": now,
            "registered_at": since,
        }

    def note_step(self, manifest: Manifest, metrics: dict[str, float], now: float) -> None:
        """A committed step."""
        sizes = {"weights_bytes": manifest.full_bytes, "delta_bytes": manifest.delta_bytes}
        self.write("step", now, step=manifest.step, **sizes, **metrics)

    def note_drawn(self, step: int, drawn: Sequence[Any], now: float) -> None:
        """The tasks that were drawn for a policy: position, pool, estimated pass rate, the one that was drawn."""
        if drawn:
            self.write("drawn", now, step=step, tasks=msgspec.to_builtins(drawn))

    def note_evals(self, views: Iterable[EvalView], now: float) -> None:
        """Evaluations that are through; those that have a line are passed over."""
        self._tail.begins_anew()
        self._evals |= {line["step"] for line in self._tail.lines(b'"kind": "eval"') if line["kind"] == "eval"}
        for view in views:
            if view.step not in self._evals:
                self.write("eval", now, **msgspec.to_builtins(view))

    def count_sent(self, size_bytes: int) -> None:
        """Bytes of weights that left here."""
        self._sent_bytes += size_bytes

    def flush(self, now: float, *, force: bool = False) -> None:
        """Write what was noted since, every few seconds."""
        if not force and now - self._flushed_at < NODES_EVERY_S:
            return
        sent_bytes, self._sent_bytes, self._flushed_at = self._sent_bytes, 0, now
        for _ in range(len(self._nodes) if force else min(len(self._nodes), NODES_AT_ONCE)):
            self.write("node", now, **self._nodes.popitem(last=False)[1])
        if sent_bytes:
            self.write("sent", now, size_bytes=sent_bytes)

    def thin(self) -> bool:
        """Of a file that has grown too large keep what is of no node, and of each process one line an hour and the
        last; whether it did. Lines keep their order."""
        if not self.path.exists() or self.path.stat().st_size <= MOST_BYTES:
            return False
        with self._appending():
            last = {_hour(line): number for number, line in enumerate(self.lines()) if line["kind"] == "node"}
            kept, fresh = set(last.values()), self.path.with_suffix(".thin")
            with fresh.open("wb") as file:
                for number, line in enumerate(self.lines()):
                    if line["kind"] != "node" or number in kept:
                        file.write(json.dumps(line).encode() + b"\n")
            fresh.replace(self.path)
        return True


def _hour(line: dict[str, Any]) -> tuple[str, float, int]:
    return line["node"], line["started_at"], int(line["at"] // 3600)


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
