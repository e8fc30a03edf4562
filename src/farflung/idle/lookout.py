"""Looks at the machine about once a second, in a thread of its own, and keeps the latest decision."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from farflung.config.idle import IdleSection, read_preferences
from farflung.idle.decide import Decision, Facts, State, step
from farflung.protocol.errors import ConfigError

log = logging.getLogger(__name__)
Read = Callable[[IdleSection], Facts]


class Watch:
    """The decision of this moment, by the owner's preferences as they are now and what this node was told beside."""

    def __init__(self, given: IdleSection, preferences: Path, read: Read) -> None:
        """Raises ConfigError for a file of preferences that cannot be read."""
        self._given, self._path, self._read = given, preferences, read
        self._stamp = self._stat()
        self.rules = given.over(read_preferences(preferences))
        self._state = State()
        self._ended = threading.Event()

    @property
    def decision(self) -> Decision:
        """The latest."""
        return self._state.decision

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While the block runs, unless nothing could keep the node from working; the first look is taken here."""
        if not self.rules.is_needed:
            yield
            return
        self.poll()
        thread = threading.Thread(target=self._follow, name="idle", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def poll(self) -> None:
        """Look once."""
        self._read_again()
        before, self._state = self.decision, step(self.rules, self._state, self._read(self.rules))
        if (before.action, before.reason) != (self.decision.action, self.decision.reason):
            log.info("idle action=%s because=%s", self.decision.action, self.decision.reason or "nothing is in the way")

    def _follow(self) -> None:
        while not self._ended.wait(self.rules.poll_s):
            try:
                self.poll()
            except Exception:  # the owner's machine is not to be used on the word of a look that failed
                log.exception("the look at this machine failed; the last decision holds")

    def _read_again(self) -> None:
        """The owner's preferences, if their file is another by now; what cannot be read changes nothing."""
        if (stamp := self._stat()) == self._stamp:
            return
        self._stamp = stamp
        try:
            self.rules = self._given.over(read_preferences(self._path))
            log.info("preferences read again path=%s", self._path)
        except ConfigError as error:
            log.error("preferences stay as they were because=%s", error)

    def _stat(self) -> tuple[int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return 0, 0
        return found.st_mtime_ns, found.st_ino
