"""The trainer's work: a step's batch, its canaries and self-test, the commit."""

from typing import Annotated

from msgspec import Meta

from farflung.protocol.identity import Signed
from farflung.protocol.messages.limits import (
    MAX_SAMPLES,
    Count,
    Digest,
    Floats,
    Id,
    Ids,
    Line,
    Message,
    Name,
    Seed,
    Step,
    Temperature,
    TokenLimit,
)
from farflung.protocol.messages.weights import Latest


class BatchRollout(Message, frozen=True):
    """One accepted sample and the coordinator's reward for it."""

    rollout: Id
    submission: Digest
    sample: int
    reward: float
    seed: Seed
    is_audited: bool
    """Whether every token of it was replayed already."""
    profile: Name = ""
    """Numerics profile of its node; the run's own if empty."""


class BatchGroup(Message, frozen=True):
    """All samples of one task at one policy step."""

    group: Id
    step: Step
    manifest: Digest
    """The weights that it was generated with."""
    prompt_ids: Ids
    rollouts: Annotated[list[BatchRollout], Meta(min_length=1, max_length=MAX_SAMPLES)]


class Canary(Message, frozen=True):
    """A rollout that the trainer makes itself, so that validators can be tried on it."""

    prompt_ids: Ids
    seed: Seed
    max_new_tokens: TokenLimit


class SelfTestItem(Message, frozen=True):
    """A rollout that the trainer made from a seed that anybody may know."""

    prompt_ids: Ids
    seed: Seed
    max_new_tokens: Annotated[int, Meta(ge=1, le=1024)]
    ids: Ids
    logp: Floats = b""
    """What the trainer's engine says of each token, at the run's temperature; empty if it did not tell."""


class SelfTest(Message, frozen=True):
    """Texts that a node may try its arithmetic on, with the weights of one version."""

    step: Step
    temperature: Temperature
    profiles: Annotated[dict[Name, Annotated[bytes, Meta(max_length=1 << 16)]], Meta(max_length=64)]
    """The profiles that the run admits as JSON; `RunInfo` has their digests."""
    items: Annotated[list[SelfTestItem], Meta(min_length=1, max_length=64)]


class Batch(Message, frozen=True):
    """The rollouts that a step consumes. Asked again, the same."""

    step: Step
    seen_groups: Count
    """Complete groups looked at, those without variance included."""
    seen_reward: float
    """Mean reward over all of them."""
    secret_commitment: Digest
    probe: Digest
    """Key that chooses the slices of the new weights that the commit shows."""
    temperature: float
    groups: Annotated[list[BatchGroup], Meta(max_length=100_000)]
    spare: Annotated[list[BatchGroup], Meta(max_length=100_000)] = []
    """Dropped groups that were paid for, with one rollout of each submission, for the tripwire."""
    canaries: Annotated[list[Canary], Meta(max_length=128)] = []
    """To be generated with the new weights and handed in with the commit; those of a self-test after the others."""
    restores: Annotated[int, Meta(ge=-1, le=10**9)] = -1
    """The earlier step whose weights and optimizer this one takes up again, without a batch; -1 for none."""
    committed: str = ""
    """Weights digest this step was committed with, if it was."""


class BatchAnswer(Message, frozen=True):
    """A batch, or nothing yet."""

    latest: Latest
    batch: Batch | None = None
    reason: Line = ""


Probe = Annotated[bytes, Meta(max_length=1 << 16)]


class ClaimStep(Message, frozen=True):
    """The trainer asks for the batch of a step."""

    wait_s: Annotated[float, Meta(ge=0, le=30)] = 0.0


class RolloutLook(Message, frozen=True):
    """How often one rollout flips, how often to a token that the policy likes better, and how often its numerics
    profile lets it on average."""

    rollout: Id
    flips: Annotated[int, Meta(ge=0, le=1 << 20)]
    liked: Annotated[int, Meta(ge=0, le=1 << 20)]
    allowed: Annotated[float, Meta(ge=0, le=1 << 20)]


class Trips(Message, frozen=True):
    """The tripwire's finds in a batch: submissions whose text it does not take for what their seeds give."""

    submissions: Annotated[list[Digest], Meta(max_length=100_000)]
    looked: Annotated[list[RolloutLook], Meta(max_length=1_000_000)] = []
    """Every rollout that it replayed."""


class Commit(Message, frozen=True):
    """The trainer ends a step: sealed manifest, digest, figures."""

    manifest: Signed
    metrics: Annotated[dict[Name, float], Meta(max_length=64)]
    checkpoint: Line = ""
    probe: Probe = b""
    """The bytes of the slices that the batch's probe chooses, in the published type."""
    probe_before: Probe = b""
    """The same slices of the step before, so that a node that still holds it can be told so."""
    canaries: Annotated[list[Ids], Meta(max_length=128)] = []
    """The new weights' completions of the batch's canaries."""
    canary_logp: Annotated[list[Floats], Meta(max_length=128)] = []
    """Their log-probabilities, or none of them."""
    restores: Annotated[int, Meta(ge=-1, le=10**9)] = -1
    """As in the batch; a batch that was rolled back meanwhile cannot be committed."""


class Rollback(Message, frozen=True):
    """The operator takes up an earlier step again, and does without the work of some nodes."""

    to_step: Step
    without: Annotated[list[Id], Meta(max_length=1000)] = []
