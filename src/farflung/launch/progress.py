"""Waits of a start, told at once and again every few seconds until they are over. Imports next to nothing."""

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

AGAIN_S = 5.0


def to_terminal(text: str) -> None:
    """One line for the person who started this, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Waits:
    """A context manager that is told what comes next; a thread says it again, for imports stop an event loop too."""

    def __init__(self, say: Callable[[str], None] = to_terminal, again_s: float = AGAIN_S) -> None:
        self._say, self._again_s = say, again_s
        self.began_at, self._what = time.monotonic(), ""
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="waits", daemon=True)

    def __enter__(self) -> "Waits":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.over()

    def __call__(self, what: str) -> None:
        """From here on this is waited for."""
        self._what = what
        self._tell(f"{what} …")
        if self._thread.ident is None:  # not before: it would say again what was not said yet
            self._thread.start()

    def over(self) -> None:
        """Nothing more is waited for, or others say so."""
        self._is_over.set()

    def _repeat(self) -> None:
        while not self._is_over.wait(self._again_s):
            self._tell(f"still {self._what} …")

    def _tell(self, text: str) -> None:
        if not self._is_over.is_set():
            self._say(f"{time.monotonic() - self.began_at:6.1f} s  {text}")
