"""A validator's work: rollouts to replay, the sealed evidence, and the verdict on it."""

from typing import Annotated, Literal

from msgspec import Meta

from farflung.protocol.messages.limits import (
    MAX_SAMPLES,
    Digest,
    Floats,
    Id,
    Ids,
    Line,
    MaybeDigest,
    Message,
    Name,
    Seconds,
    Seed,
    Step,
)
from farflung.protocol.messages.weights import Latest
from farflung.protocol.numerics import Dtype, Verifiers


class AuditRollout(Message, frozen=True):
    """One rollout to replay; prompt, seed and max_new_tokens are the coordinator's own."""

    rollout: Id
    prompt_ids: Ids
    seed: Seed
    ids: Ids


class AuditJob(Message, frozen=True):
    """One submission's drawn rollouts."""

    audit: Id
    step: Step
    manifest: Digest
    temperature: float
    max_new_tokens: int
    nonce: Digest
    probe: Digest
    profile: Annotated[bytes, Meta(max_length=1 << 16)]
    """The node's numerics profile as JSON."""
    verify_in: Verifiers
    """Arithmetics to replay in: the first that there is room for. A second opinion has another one than the first,
    where the profile was verified in several."""
    cap: float
    """Likelihood ratio at which the evidence is decisive, so that the rest need not be replayed; 0 to replay all."""
    rollouts: Annotated[list[AuditRollout], Meta(min_length=1, max_length=MAX_SAMPLES)]
    others: Annotated[list[AuditRollout], Meta(max_length=64)] = []
    """Further rollouts of the submission, for the explanations alone."""
    is_suspect: bool = False
    """Whether this is the second opinion on a would-be ejection, and other explanations are to be tried."""
    manifest_before: MaybeDigest = ""
    """Of the step before, one of these explanations."""


class AuditJobs(Message, frozen=True):
    """Work for a validator, all of one step."""

    latest: Latest
    jobs: Annotated[list[AuditJob], Meta(max_length=1024)] = []


class RolloutEvidence(Message, frozen=True):
    """The evidence of one rollout's replay: float32 gap, margin, pick and lead per generated token."""

    rollout: Id
    gap: Floats
    margin: Floats
    pick: Floats
    """The policy's own probability of the seeded pick."""
    lead: Floats
    """By how much the policy itself prefers the runner-up to the pick, in nats."""


class Explanation(Message, frozen=True):
    """The same rollouts, replayed as if a suspect had computed in another way."""

    name: Name
    rollouts: Annotated[list[RolloutEvidence], Meta(min_length=1, max_length=MAX_SAMPLES)]


class Evidence(Message, frozen=True):
    """A validator's findings on one audit, sealed by its key. It judges nothing."""

    run: Id
    audit: Id
    manifest: Digest
    profile: Name
    """Of the node that is audited."""
    arithmetic: Dtype
    """What the replay was computed in, one of those that the profile was verified in."""
    rollouts: Annotated[list[RolloutEvidence], Meta(min_length=1, max_length=MAX_SAMPLES)]
    """The drawn rollouts in their order; only the first ones where these are decisive."""
    possession: MaybeDigest = ""
    """As in a submission, for the audit's nonce and probe."""
    explanations: Annotated[list[Explanation], Meta(max_length=8)] = []
    """Of a would-be ejection; each of the drawn rollouts and the others after them, `as leased` among them."""


class Verdict(Message, frozen=True):
    """The coordinator's judgement of a node, sealed."""

    run: Id
    node: Id
    audit: Id
    outcome: Literal["void", "quarantine", "eject", "release"]
    statistic: float
    threshold: float
    reason: Line
    decided_at: Seconds
    diagnosis: Line = ""
    """The explanation that fits best by far, such as the weights of the step before."""
