"""Finished rollouts of a lease, and the signed receipt for them."""

from typing import Annotated

from msgspec import Meta

from farflung.protocol.messages.limits import (
    MAX_SAMPLES,
    Count,
    Digest,
    Floats,
    Id,
    Ids,
    MaybeDigest,
    Message,
    Seconds,
)


class SubmittedRollout(Message, frozen=True, omit_defaults=True):
    """One finished sample."""

    rollout: Id
    ids: Ids


class SubmissionBody(Message, frozen=True):
    """The part that is stored and hashed: lease, node and tokens, nothing else."""

    lease: Id
    node: Id
    rollouts: Annotated[list[SubmittedRollout], Meta(min_length=1, max_length=MAX_SAMPLES)]


class Submission(Message, frozen=True):
    """The rollouts of one lease. Log-probabilities and timings are metrics and nothing more."""

    rollouts: Annotated[list[SubmittedRollout], Meta(min_length=1, max_length=MAX_SAMPLES)]
    possession: MaybeDigest = ""
    """SHA-256 over the lease's nonce and the slices that its probe chooses, as they are in the engine."""
    partial: bool = False
    """A draining node hands in what is complete; the rest goes back."""
    logp: Annotated[list[Floats], Meta(max_length=MAX_SAMPLES)] = []
    generate_s: Seconds = 0.0


class Receipt(Message, frozen=True):
    """The coordinator's signed word that it holds a submission."""

    run: Id
    node: Id
    before: MaybeDigest
    """BLAKE3 of the payload of this node's receipt before: a chain in which none can be dropped quietly."""
    lease: Id
    submission: Digest
    rollouts: Count
    tokens: Count
    received_at: Seconds
