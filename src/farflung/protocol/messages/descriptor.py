"""A run as its nodes must know it: the sealed descriptor, and the keys that the root lets speak for it."""

from typing import Annotated, Literal

from msgspec import Meta

from farflung.protocol.identity import Signed
from farflung.protocol.messages.limits import (
    MOST_END_TOKENS,
    Count,
    Digest,
    Id,
    MaybeDigest,
    Message,
    Name,
    Public,
    Seconds,
)
from farflung.protocol.numerics import Dtype, Numerics


class Delegation(Message, frozen=True):
    """The root key's word that another key may sign documents of one kind for one run until it expires."""

    run: Id
    purpose: Literal["coordinator", "weights", "receipts", "verdicts"]
    public: Public
    expires_at: Seconds


class File(Message, frozen=True):
    """A small file that belongs to the run, such as the model's config.json."""

    name: Annotated[str, Meta(pattern=r"^\w[\w.-]{0,79}(?!\n)$")]
    digest: Digest
    size_bytes: Count


class AdmittedProfile(Numerics, frozen=True):
    """A numerics profile that a run admits: whose it is, and SHA-256 of its JSON."""

    digest: MaybeDigest


class RunInfo(Message, frozen=True):
    """The facts of a run that a node must know; sealed by the coordinator's key."""

    run: Id
    coordinator: Id
    status: Name
    version: int
    profile: Name
    profiles: Annotated[dict[Name, AdmittedProfile], Meta(max_length=64)]
    """Numerics profiles that a node may pick by name, the run's own among them. Their digests keep the operator from
    judging by other numbers than it signed."""
    dtype: Dtype
    """Arithmetic of evaluation and of the trainer's own replays; every profile was verified in it."""
    vocab: Count
    eos_ids: Annotated[list[int], Meta(max_length=MOST_END_TOKENS)]
    model_files: Annotated[list[File], Meta(max_length=64)]
    max_staleness: Count
    heartbeat_s: Seconds
    noise: Name
    """The function of seed, position and token that every node of the run samples with, by name."""
    longest_prompt: Count = 0
    """Tokens of the longest prompt; 0 if it is not told."""
    max_new_tokens: Count = 0
    """Most tokens of a completion, by which nodes judge whether they have room; 0 if it is not told."""


class Run(Message, frozen=True):
    """Answer of GET /v1/runs/{run}: the sealed info and the root's delegations."""

    root: Public
    delegations: Annotated[list[Signed], Meta(max_length=16)]
    info: Signed
