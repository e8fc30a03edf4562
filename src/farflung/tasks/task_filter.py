"""The file of tasks that a run is to train on: `farflung filter-tasks` writes it, the coordinator reads it once.

JSON Lines, a task a line: its digest, how often the base model was right, and the prompt for people to read.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from farflung.protocol.errors import ConfigError

MOST_LINES = 1_000_000


class FilteredTask(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One task of the file."""

    task: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    """SHA-256 of the task's canonical JSON."""
    tried: Annotated[int, Meta(ge=1, le=1_000_000)]
    right: Annotated[int, Meta(ge=0, le=1_000_000)]
    tokens: Annotated[int, Meta(ge=0)]
    """Tokens of all samples together."""
    prompt: str = ""

    @property
    def pass_rate(self) -> float:
        """Share of the samples that were right."""
        return self.right / self.tried


def payload(task: Any) -> bytes:
    """The canonical JSON of a task."""
    return msgspec.json.encode(task, order="sorted")


def identity(task: Any) -> str:
    """The digest by which the file names a task."""
    return hashlib.sha256(payload(task)).hexdigest()


def within(found: Iterable[FilteredTask], low: float, high: float) -> list[FilteredTask]:
    """Those whose pass rate lies in the band, its ends included."""
    return [one for one in found if low <= one.pass_rate <= high]


def write(path: Path, kept: Iterable[FilteredTask]) -> None:
    """Write the file, whole or not at all."""
    draft = path.with_name(path.name + ".part")
    draft.write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in kept))
    draft.replace(path)


def read(path: str) -> Mapping[str, FilteredTask]:
    """The file's tasks by digest. Raises ConfigError naming the line."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"env.keep = {path!r} cannot be read: {error.strerror}") from error
    if len(lines) > MOST_LINES:
        raise ConfigError(f"env.keep = {path!r} has {len(lines)} lines; at most {MOST_LINES} work")
    found = [_row(path, number, line) for number, line in enumerate(lines, 1)]
    return {one.task: one for one in found}


def _row(path: str, number: int, line: bytes) -> FilteredTask:
    try:
        one = msgspec.json.decode(line, type=FilteredTask)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} line {number}: {error}; `farflung filter-tasks` writes such files") from error
    if one.right > one.tried:
        raise ConfigError(f"{path} line {number}: {one.right} of {one.tried} samples right")
    return one
