"""What a node tells of itself in heartbeats: figures of its work, and how far each lease is."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["work", "made", "proof"]


@dataclass
class Held:
    """A lease at work."""

    lease: str
    lane: int
    """The number under which it was asked for: `device` in messages."""
    lapses_at: float = 0.0
    """By this machine's clock."""
    _count: Callable[[], int] = int
    _first: int = 0

    @property
    def made(self) -> int:
        """Rises while it is generated; 0 until then."""
        return self._count() - self._first

    def follow(self, count: Callable[[], int]) -> None:
        """Tell of progress by a count that rises from here on."""
        self._count, self._first = count, count()


class _Busy:
    """The time during which at least one of several overlapping blocks runs, each second counted once."""

    def __init__(self) -> None:
        self._lock, self._blocks, self._counted_to = threading.Lock(), 0, 0.0

    def enter(self) -> float:
        """Gives the time at which the block begins."""
        with self._lock:
            now = time.monotonic()
            self._counted_to = self._counted_to if self._blocks else now
            self._blocks += 1
            return now

    def leave(self) -> float:
        """Seconds that were not counted before."""
        with self._lock:
            now = time.monotonic()
            counted_s, self._counted_to = now - self._counted_to, now
            self._blocks -= 1
            return counted_s


@dataclass
class NodeStats:
    """Figures that a role gives of itself in heartbeats: metrics, which no other role believes."""

    phase: str = "starting"
    loaded_step: int = -1
    work_cpu_s: float = 0.0
    recent_cpu_s: float = 0.0
    recent_tokens: int = 0
    made_cpu_s: float = 0.0
    made_tokens: int = 0
    proof_cpu_s: float = 0.0
    sync_pause_s: float = 0.0
    fetched_bytes: int = 0
    work_device_s: float = 0.0
    recent_device_s: float = 0.0
    made_device_s: float = 0.0
    proof_device_s: float = 0.0
    accelerators: int = 0
    """Accelerators that this role computes on; their seconds are counted beside the processor's."""
    is_served: bool = False
    """Whether a server on the processor computes for it: the thread that waits uses no CPU-seconds, the server does."""
    last_error: str = ""
    """The last fault with weights."""
    started_at: float = field(default_factory=time.time)
    _busy: dict[Kind, _Busy] = field(default_factory=lambda: {"work": _Busy(), "made": _Busy(), "proof": _Busy()})

    @contextlib.contextmanager
    def working(self, kind: Kind = "work") -> Iterator[Callable[[], tuple[float, float]]]:
        """Count what the block uses as work, or as generation or proof beside it; gives what it has used so far.

        That is CPU-seconds of this thread, of a server at least one core's; and device-seconds, the time it takes on
        each accelerator. Seconds of a server or an accelerator that several blocks share are counted once.
        """
        cpu_s, busy = time.thread_time(), self._busy[kind]

        def used(taken_s: float) -> tuple[float, float]:
            return taken_s if self.is_served else time.thread_time() - cpu_s, taken_s * self.accelerators

        began_s = busy.enter()
        try:
            yield lambda: used(time.monotonic() - began_s)
        finally:
            for clock, seconds in zip(("cpu_s", "device_s"), used(busy.leave()), strict=True):
                setattr(self, f"{kind}_{clock}", getattr(self, f"{kind}_{clock}") + seconds)
