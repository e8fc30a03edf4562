"""Assigned work: the samples to make, the sealed lease, how it is asked for."""

from typing import Annotated

from msgspec import Meta

from farflung.protocol.identity import Signed
from farflung.protocol.messages.limits import (
    MAX_SAMPLES,
    Count,
    Device,
    Digest,
    Id,
    Ids,
    Line,
    Message,
    Purpose,
    Seconds,
    Seed,
    Step,
    Temperature,
    TokenLimit,
)
from farflung.protocol.messages.weights import Latest


class Sample(Message, frozen=True):
    """One rollout to make."""

    rollout: Id
    index: Annotated[int, Meta(ge=0, lt=MAX_SAMPLES)]
    seed: Seed


class LeaseGroup(Message, frozen=True):
    """Samples of one task, with the prompt as token ids."""

    group: Id
    prompt_ids: Ids
    samples: Annotated[list[Sample], Meta(min_length=1, max_length=MAX_SAMPLES)]


class Lease(Message, frozen=True):
    """Assigned work, sealed by the coordinator."""

    lease: Id
    run: Id
    node: Id
    purpose: Purpose
    step: Step
    manifest: Digest
    temperature: Temperature
    max_new_tokens: TokenLimit
    nonce: Digest
    probe: Digest
    """Key that chooses the slices of the weights of which the submission shows possession."""
    expires_at: Seconds
    groups: Annotated[list[LeaseGroup], Meta(min_length=1, max_length=MAX_SAMPLES)]


class LeaseRequest(Message, frozen=True):
    """A node asks for work."""

    loaded_step: Annotated[int, Meta(ge=-1, le=10**9)] = -1
    slots: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] = 16
    memory_bytes: Count = 0
    context: Count = 0
    """Longest prompt plus completion the node can hold, 0 for no limit."""
    wait_s: Annotated[float, Meta(ge=0, le=30)] = 0.0
    device: Device = 0
    """The device that asks; each holds a lease of its own."""


class LeaseAnswer(Message, frozen=True):
    """A sealed lease, or why there is none and when to ask again."""

    latest: Latest
    lease: Signed | None = None
    reason: Line = ""
    retry_after_s: Seconds = 0.0
