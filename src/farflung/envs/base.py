"""An environment: tasks, prompts and scores. Five members, and nothing else to learn.

`envs/child_main.py` calls `score` in a process of its own; `rollouts/accept.py:take_scores` keeps the reward.
"""

from collections.abc import Iterator
from typing import Any, Literal, Protocol

import msgspec

Split = Literal["train", "eval"]
Task = dict[str, Any]
"""All that `prompt` and `score` need, as JSON values; its canonical JSON is its identity."""


class Score(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The worth of a transcript."""

    reward: float
    """In [0, 1]; 1 is right."""
    parts: dict[str, float] = {}
    """Named components, for people to read."""
    answer: str = ""
    """The answer that was found in the transcript, for people to read."""


class Env(Protocol):
    """The environment that a run trains on. A user's own is any class with these five members."""

    version: str
    """Changes whenever the same transcript could score differently."""
    spec: dict[str, Any]
    """How to make this very environment again: the keyword arguments of its constructor."""

    def tasks(self, split: Split) -> Iterator[Task]:
        """Yield the tasks of a split, always the same ones in the same order; no question is in both splits."""
        ...

    def prompt(self, task: Task) -> str | list[dict[str, str]]:
        """The question as plain text, or as chat messages (`role`, `content`) for the model's chat template."""
        ...

    def score(self, task: Task, transcript: str) -> Score:
        """Judge what the model said. The transcript is untrusted text: never run it."""
        ...
