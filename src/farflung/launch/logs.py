"""Logs of every process. Text of strangers stays within its line, and a terminal obeys none of it."""

import json as json_module
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from farflung.protocol.shown import one_line, visible

TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
WARNING = re.compile(r"^[\d-]+ [\d:,]+ (?:WARNING|ERROR|CRITICAL) \S+ (.*)$")
"""A line of such a log that a person should see."""
NUMBER = re.compile(r"\b[a-z]?[0-9a-f]{8,}\b|\d+(?:\.\d+)?")
MOST_BYTES = 1 << 20
"""More of a log is not looked through for its last words."""


class Lines(logging.Formatter):
    """One line per record; a traceback follows on lines of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The record's line."""
        return one_line(super().formatMessage(record))

    def formatException(self, ei: object) -> str:
        """A traceback, whose last line may quote a stranger."""
        return visible(super().formatException(ei))  # type: ignore[arg-type]


class Json(logging.Formatter):
    """One JSON object per record, in ASCII, so that nothing in it is obeyed and it always parses."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's line."""
        fields = {"at": self.formatTime(record), "level": record.levelname, "logger": record.name}
        fields["message"] = record.getMessage()
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json_module.dumps(fields)


def start_logging(json: bool = False) -> None:
    """One line per change of state on standard error, as text or as JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(Json() if json else Lines(TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("httpx2", "httpcore2", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def alike(text: str) -> str:
    """A message without its numbers and ids: two that say the same of other things are alike."""
    return NUMBER.sub("#", text)


def last_words(path: Path, since: int = 0) -> str:
    """Why a process ended, out of what it logged after the first `since` bytes: its own sentence, or its exception."""
    try:
        with path.open("rb") as file:
            file.seek(max(since, path.stat().st_size - MOST_BYTES))
            lines = file.read().decode(errors="replace").rstrip().splitlines()
    except OSError:
        return ""
    return one_line(_last_sentence(lines)).removeprefix("farflung: ")[:1000]


def _last_sentence(lines: list[str]) -> str:
    """The last line; of a traceback, whose exception may have many, the first line after it."""
    begins = [number for number, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    after = lines[begins[-1] + 1 :] if begins else []
    raised = [line for line in after if line and not line.startswith((" ", "\t"))]
    return raised[0] if raised else lines[-1] if lines else ""


class LogWarnings:
    """Follows the logs in a folder for warnings and errors: each look reads only what was written since the last."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets = {path: path.stat().st_size for path in folder.glob("*.log")}

    def poll(self) -> Iterator[tuple[str, str]]:
        """The warnings since the last look, each with the name of its log."""
        for path in sorted(self._folder.glob("*.log")):
            for line in self._more(path):
                if found := WARNING.match(line):
                    yield path.stem, found[1]

    def _more(self, path: Path) -> list[str]:
        offset = self._offsets.get(path, 0)
        with path.open("rb") as file:
            file.seek(offset)
            whole = file.read().rpartition(b"\n")[0]
        self._offsets[path] = offset + len(whole)
        return whole.decode(errors="replace").splitlines()
