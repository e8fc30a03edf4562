"""A scorer's work: transcripts to judge and their scores."""

from typing import Annotated

from msgspec import Meta

from farflung.protocol.messages.limits import MAX_TOKENS, Count, Finite, Id, Line, Message
from farflung.protocol.messages.weights import Latest


class Claim(Message, frozen=True):
    """A scorer or validator asks for work."""

    limit: Annotated[int, Meta(ge=1, le=1024)] = 32
    wait_s: Annotated[float, Meta(ge=0, le=30)] = 0.0
    linger_s: Annotated[float, Meta(ge=0, le=600)] = 0.0
    """How long audits of trusted nodes may wait for company, for many are replayed cheaper than one by one."""


class ScoreJob(Message, frozen=True):
    """One transcript to score."""

    rollout: Id
    task: Annotated[bytes, Meta(max_length=1 << 20)]
    """The task as JSON."""
    transcript: Annotated[str, Meta(max_length=8 * MAX_TOKENS)]
    """Cut off there: tokens may be long."""


class ScoreJobs(Message, frozen=True):
    """Work for a scorer."""

    latest: Latest
    jobs: Annotated[list[ScoreJob], Meta(max_length=1024)] = []


class ScoreResult(Message, frozen=True):
    """The score of a transcript, or why it has none."""

    rollout: Id
    reward: Annotated[float, Meta(ge=0, le=1)] = 0.0
    parts: Annotated[dict[Line, Finite], Meta(max_length=32)] = {}
    answer: Annotated[str, Meta(max_length=500)] = ""
    error: Line = ""


class Scores(Message, frozen=True):
    """A scorer's results."""

    results: Annotated[list[ScoreResult], Meta(min_length=1, max_length=1024)]


class Done(Message, frozen=True):
    """How many of the things sent changed anything; sent twice, the second time none."""

    changed: Count
