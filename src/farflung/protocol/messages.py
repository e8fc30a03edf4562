"""Everything that crosses a machine, once, as bounded structs: the wire, the OpenAPI and the docs come from here.

Every string and list has a bound and unknown fields are refused. Token ids travel as little-endian uint32 bytes
(base64 in JSON), floats per token as little-endian float32 bytes. Times are Unix seconds. Patterns end in `(?!\\n)$`
because Python's `$` alone also matches before a last line feed.
"""

import math
from typing import Annotated, Literal

from msgspec import Meta, Struct

from farflung.protocol.identity import Signed

VERSION = 3
"""Spoken protocol version; a node with another is told what to do."""

MAX_TOKENS = 131_072
MAX_SAMPLES = 4_096
MOST_END_TOKENS = 64
TRANSCRIPT_CHARS = 8 * MAX_TOKENS

Id = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,63}(?!\n)$")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}(?!\n)$")]
MaybeDigest = Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?(?!\n)$")]
Name = Annotated[str, Meta(max_length=80, pattern=r"^[\w .:/+@()-]*(?!\n)$")]
Line = Annotated[str, Meta(max_length=500)]
Ids = Annotated[bytes, Meta(max_length=4 * MAX_TOKENS)]
Floats = Annotated[bytes, Meta(max_length=4 * MAX_TOKENS)]
Fingerprint = Annotated[bytes, Meta(max_length=32)]
"""Signed bytes, of which `farflung.protocol.fingerprint` tells the meaning; empty for none."""
Public = Annotated[bytes, Meta(min_length=32, max_length=32)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Seconds = Annotated[float, Meta(ge=0, le=1e12)]
Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]
Step = Annotated[int, Meta(ge=0, le=10**9)]
Seed = Annotated[int, Meta(ge=0)]
"""Unsigned 64-bit; more than SQL or JavaScript numbers hold."""
Purpose = Literal["train", "eval", "data"]
Role = Literal["worker", "relay", "trainer", "validator", "scorer"]
Url = Annotated[
    str,
    Meta(max_length=200, pattern=r"^(https?://([A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?)?(?!\n)$"),
]
"""Scheme, host and port, no path; empty for none."""


class Message(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every wire type: frozen, unknown fields refused."""


class Empty(Message, frozen=True):
    """Nothing to say."""


# --- joining ---------------------------------------------------------------------------------------------------------


class Hardware(Message, frozen=True):
    """What a node says of its machine; shown to people, believed by nobody."""

    cpu: Name = ""
    cores: Annotated[int, Meta(ge=0, le=100_000)] = 0
    memory_bytes: Count = 0
    accelerator: Name = ""


class Register(Message, frozen=True):
    """A node's first word. Who it is comes from the signature."""

    version: Annotated[int, Meta(ge=0, le=10**6)]
    name: Name = ""
    role: Role = "worker"
    engine: Name = ""
    profile: Name = ""
    hardware: Hardware = Hardware()
    url: Url = ""
    """Where a relay is reached."""
    invite: Annotated[str, Meta(max_length=128)] = ""


class Welcome(Message, frozen=True):
    """The node is known."""

    node: Id
    role: Role
    status: Name
    runs: Annotated[list[Id], Meta(max_length=1000)]


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


class RunInfo(Message, frozen=True):
    """What a node must know of a run; sealed by the coordinator's key."""

    run: Id
    coordinator: Id
    status: Name
    version: int
    profile: Name
    profiles: Annotated[dict[Name, MaybeDigest], Meta(max_length=64)]
    """Numerics profiles that a node may pick, the run's own among them: name and SHA-256 of its JSON, so that
    the operator cannot judge by other numbers than it signed."""
    dtype: Literal["float32", "bfloat16"]
    vocab: Count
    eos_ids: Annotated[list[int], Meta(max_length=MOST_END_TOKENS)]
    model_files: Annotated[list[File], Meta(max_length=64)]
    max_staleness: Count
    heartbeat_s: Seconds


class Run(Message, frozen=True):
    """Answer of GET /v1/runs/{run}: the sealed info and the root's delegations."""

    root: Public
    delegations: Annotated[list[Signed], Meta(max_length=16)]
    info: Signed


# --- weights ---------------------------------------------------------------------------------------------------------


_WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1, "float8_e5m2": 1}


class Tensor(Message, frozen=True):
    """One tensor of a step, and the shard that carries it."""

    name: Annotated[str, Meta(max_length=300)]
    dtype: Literal["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"]
    shape: Annotated[list[Count], Meta(max_length=8)]
    digest: Digest
    """BLAKE3 of its little-endian bytes."""
    shard: Annotated[int, Meta(ge=0, lt=100_000)]
    """Number of the shard that carries it, in `shards` and in `deltas` alike."""

    @property
    def width(self) -> int:
        """Bytes of one value."""
        return _WIDTHS[self.dtype]

    @property
    def values(self) -> int:
        """How many values it has; a tensor without dimensions has one."""
        return math.prod(self.shape)


class Shard(Message, frozen=True):
    """One write-once blob: some tensors as a safetensors file, or their difference to the step before."""

    digest: Digest
    size_bytes: Count


class Adapter(Message, frozen=True):
    """What a version adds to one matrix of its base: 2^exponent · B A, of B (out, rank) and A (rank, in) in int16."""

    name: Annotated[str, Meta(max_length=300)]
    """The tensor that it is added to."""
    rank: Annotated[int, Meta(ge=1, le=4096)]
    exponent: Annotated[int, Meta(ge=-300, le=230)]
    shard: Annotated[int, Meta(ge=0, lt=100_000)]
    """Number of the shard that carries B and A, among `shards`."""


class Manifest(Message, frozen=True):
    """One version of the weights, sealed by the run's weights key."""

    run: Id
    step: Step
    base_step: Step
    """The step that `deltas` are a difference to, that of `parent`; equal to `step` where there are none."""
    parent: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?(?!\n)$")]
    """Digest of the previous step's manifest, empty for the first."""
    digest: Digest
    """BLAKE3 over the (name, digest) pairs of all tensors in order: what the weights must come to."""
    tensors: Annotated[list[Tensor], Meta(max_length=1_000_000)]
    shards: Annotated[list[Shard], Meta(max_length=100_000)]
    """The whole weights; empty unless the step is an anchor. With `adapters`, their base, and then they themselves."""
    secret_commitment: Digest
    """SHA-256 commitment to the secret that this step's seeds derive from."""
    made_at: Seconds
    expires_at: Seconds
    deltas: Annotated[list[Shard], Meta(max_length=100_000)] = []
    """The difference to the step before; empty where it would be no smaller, and for the first step."""
    adapters: Annotated[list[Adapter], Meta(max_length=1_000_000)] = []
    """What is added to the base that `shards` hold, in the order of `tensors`; empty where they hold the weights."""

    @property
    def full_bytes(self) -> int:
        """Bytes of all values."""
        return sum(tensor.values * tensor.width for tensor in self.tensors)

    @property
    def delta_bytes(self) -> int:
        """Bytes that lead on from the step before: of the difference to it, or of the adapters."""
        return sum(shard.size_bytes for shard in (*self.deltas, *self.shards[self.base_shards :]))

    @property
    def anchor_bytes(self) -> int:
        """Bytes of the whole weights as published; 0 for a step that is adapters on a base."""
        return 0 if self.adapters else sum(shard.size_bytes for shard in self.shards)

    @property
    def kind(self) -> str:
        """What a person calls it; an anchor may be a difference too."""
        return "adapters" if self.adapters else "anchor" if self.shards else "difference"

    @property
    def base_shards(self) -> int:
        """How many of `shards` hold tensors; those after them hold adapters."""
        return min((adapter.shard for adapter in self.adapters), default=len(self.shards))


class Latest(Message, frozen=True):
    """Where the run stands."""

    status: Name
    step: Annotated[int, Meta(ge=-1, le=10**9)]
    """Latest published policy step, -1 before the first."""
    manifest: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?(?!\n)$")]
    """Digest of its sealed manifest."""


class RelayView(Message, frozen=True):
    """One relay that is online."""

    node: Id
    url: Url


class Relays(Message, frozen=True):
    """Relays that nodes may fetch shards from. None of them is trusted."""

    relays: Annotated[list[RelayView], Meta(max_length=64)]


# --- work ------------------------------------------------------------------------------------------------------------


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
    temperature: Annotated[float, Meta(ge=0, le=10)]
    budget: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    nonce: Digest
    probe: Digest
    """Key that chooses the slices of the weights of which the submission shows possession."""
    expires_at: Seconds
    groups: Annotated[list[LeaseGroup], Meta(min_length=1, max_length=MAX_SAMPLES)]
    fingerprint: bool = False
    """Whether every rollout must carry a fingerprint, made with the nonce."""


class LeaseRequest(Message, frozen=True):
    """A node asks for work."""

    loaded_step: Annotated[int, Meta(ge=-1, le=10**9)] = -1
    slots: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] = 16
    memory_bytes: Count = 0
    context: Count = 0
    """Longest prompt plus completion the node can hold, 0 for no limit."""
    wait_s: Annotated[float, Meta(ge=0, le=30)] = 0.0


class LeaseAnswer(Message, frozen=True):
    """A sealed lease, or why there is none and when to ask again."""

    latest: Latest
    lease: Signed | None = None
    reason: Line = ""
    retry_after_s: Seconds = 0.0


class SubmittedRollout(Message, frozen=True, omit_defaults=True):
    """One finished sample; a fingerprint that is empty is left out."""

    rollout: Id
    ids: Ids
    fingerprint: Fingerprint = b""
    """Of the activations behind its first tokens, if the lease asks for it."""


class SubmissionBody(Message, frozen=True):
    """What is stored and hashed: lease, node, tokens and fingerprints, nothing else."""

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


class Heartbeat(Message, frozen=True):
    """Still here. Figures are metrics."""

    phase: Name = ""
    loaded_step: Annotated[int, Meta(ge=-1, le=10**9)] = -1
    cpu_s: Seconds = 0.0
    work_cpu_s: Seconds = 0.0
    """CPU-seconds of the role's own work: generation (worker), replay and its weight loading (validator)."""
    recent_cpu_s: Seconds = 0.0
    """CPU-seconds of a validator's latest claims, weight loading included."""
    recent_tokens: Count = 0
    """Tokens that it replayed in them."""
    made_cpu_s: Seconds = 0.0
    """CPU-seconds that a validator generated for, when it evaluated."""
    made_tokens: Count = 0
    proof_cpu_s: Seconds = 0.0
    """CPU-seconds that a worker spent on proof beyond generation."""
    sync_pause_s: Seconds = 0.0
    started_at: Seconds = 0.0
    trouble: Line = ""
    """What last went wrong with weights on this node, such as a relay that lied, in its own words."""


class Ruling(Message, frozen=True):
    """A verdict as its node's owner is told of it."""

    id: Count
    """Rises from verdict to verdict."""
    outcome: Literal["void", "quarantine", "eject", "release"]
    submission: MaybeDigest
    """The one that was judged; empty where an operator ejected the node."""
    reason: Line
    """In detail once the step is closed; short before."""
    at: Seconds


class Pulse(Message, frozen=True):
    """Answer to a heartbeat."""

    latest: Latest
    status: Name
    """The node's standing."""
    clean: Count = 0
    """Clean audited rollouts in a row of a worker on probation."""
    needed: Count = 0
    """How many end probation; 0 for roles of which no trust is kept."""
    rulings: Annotated[list[Ruling], Meta(max_length=8)] = []
    """The latest verdicts on the node, oldest first."""
    lost_leases: Annotated[list[Id], Meta(max_length=1000)] = []


# --- scoring ---------------------------------------------------------------------------------------------------------


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
    """What a transcript is worth, or why that could not be told."""

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


# --- audits ----------------------------------------------------------------------------------------------------------


class AuditRollout(Message, frozen=True):
    """One rollout to replay; prompt, seed and budget are the coordinator's own."""

    rollout: Id
    prompt_ids: Ids
    seed: Seed
    ids: Ids
    fingerprint: Fingerprint = b""
    """As it was sent."""


class AuditJob(Message, frozen=True):
    """One submission's drawn rollouts."""

    audit: Id
    step: Step
    manifest: Digest
    temperature: float
    budget: int
    nonce: Digest
    probe: Digest
    profile: Annotated[bytes, Meta(max_length=1 << 16)]
    """The node's numerics profile as JSON."""
    cap: float
    """Likelihood ratio at which the evidence is decisive, so that the rest need not be replayed; 0 to replay all."""
    rollouts: Annotated[list[AuditRollout], Meta(min_length=1, max_length=MAX_SAMPLES)]
    others: Annotated[list[AuditRollout], Meta(max_length=64)] = []
    """Further rollouts of the submission, for the explanations alone."""
    is_suspect: bool = False
    """Whether this is the second opinion on a would-be ejection, and other explanations are to be tried."""
    manifest_before: MaybeDigest = ""
    """Of the step before, one of these explanations."""
    fingerprint: MaybeDigest = ""
    """The lease's nonce, with which the fingerprints were made; empty if none were asked for."""


class AuditJobs(Message, frozen=True):
    """Work for a validator, all of one step."""

    latest: Latest
    jobs: Annotated[list[AuditJob], Meta(max_length=1024)] = []


class RolloutEvidence(Message, frozen=True):
    """What replay saw in one rollout: float32 gap, margin, pick and lead per generated token."""

    rollout: Id
    gap: Floats
    margin: Floats
    pick: Floats
    """The policy's own probability of the seeded pick."""
    lead: Floats
    """By how much the policy itself prefers the runner-up to the pick, in nats."""
    distance: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    """Of the fingerprint that was sent from the validator's own; required if the audit names a nonce for it."""


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


# --- steps -----------------------------------------------------------------------------------------------------------


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
    budget: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]


class SelfTestItem(Message, frozen=True):
    """A rollout that the trainer made from a seed that anybody may know."""

    prompt_ids: Ids
    seed: Seed
    budget: Annotated[int, Meta(ge=1, le=1024)]
    ids: Ids


class SelfTest(Message, frozen=True):
    """What a node may try its arithmetic on, with the weights of one version."""

    step: Step
    temperature: Annotated[float, Meta(ge=0, le=10)]
    profiles: Annotated[dict[Name, Annotated[bytes, Meta(max_length=1 << 16)]], Meta(max_length=64)]
    """The profiles that the run admits as JSON; `RunInfo` has their digests."""
    items: Annotated[list[SelfTestItem], Meta(min_length=1, max_length=64)]


class Batch(Message, frozen=True):
    """What a step consumes. Asked again, the same."""

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
    """What the tripwire found in a batch: submissions whose text it does not take for what their seeds give."""

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
    """What the new weights say to the batch's canaries."""
    restores: Annotated[int, Meta(ge=-1, le=10**9)] = -1
    """As in the batch; a batch that was rolled back meanwhile cannot be committed."""


class Rollback(Message, frozen=True):
    """The operator takes up an earlier step again, and does without the work of some nodes."""

    to_step: Step
    without: Annotated[list[Id], Meta(max_length=1000)] = []


# --- looking ---------------------------------------------------------------------------------------------------------


class NodeView(Message, frozen=True):
    """One node as people see it."""

    node: Id
    name: Name
    role: Name
    status: Name
    record: Name
    phase: Name
    loaded_step: int
    accepted: int
    rejected: int
    audits: int
    statistic: float
    tokens_per_s: float
    credit: int
    escrow: int
    lease: str
    """The lease it holds, empty for none."""
    seen_s_ago: float
    is_online: bool


class StepView(Message, frozen=True):
    """One committed step."""

    step: int
    reward: float
    groups: int
    committed_at: float
    metrics: dict[str, float]


class EvalView(Message, frozen=True):
    """Held-out score of one step; `low` and `high` hold the true one by 95 % (Wilson)."""

    step: int
    score: float
    """Mean reward of one greedy answer to each task: pass@1."""
    tasks: int
    low: float
    high: float
    pass_k: float | None = None
    """The chance that one of `k` sampled answers is right (Chen et al. 2021); None where nothing was sampled."""
    pass_k_low: float | None = None
    pass_k_high: float | None = None
    pass_k_tasks: int = 0
    k: int = 0


class Status(Message, frozen=True):
    """A run at a glance."""

    run: Id
    status: Name
    model: Line
    env: Line
    steps_total: int
    latest: Latest
    started_at: float
    now: float
    rollouts: dict[str, int]
    groups: dict[str, int]
    leases_open: int
    leases_reissued: int
    audits: dict[str, int]
    accepted: int
    accepted_tokens: int
    steps: list[StepView]
    evals: list[EvalView]
    nodes: list[NodeView]
    verdicts: list[Verdict]
    brake: str
    """Why verdicts and training are held, empty if they are not."""
    catch: dict[str, float]
    """P(a trusted node that cheats on 10 % of its rollouts is found within n submissions), by n, at the floor."""
    warnings: list[str]
    """What a person should look at, the latest last: nodes and validators with other weights than they were told."""


class VersionView(Message, frozen=True):
    """One version of the weights as people see it."""

    step: int
    manifest: Digest
    full_bytes: int
    """Bytes of all values."""
    anchor_bytes: int
    """Bytes of the whole weights as published, 0 where the step is no anchor."""
    delta_bytes: int
    """Bytes of the difference to the step before, or of adapters; 0 where there is neither."""
    nodes: int
    """Nodes that are online and have it loaded."""
    published_at: float


class Trouble(Message, frozen=True):
    """What last went wrong with weights on one node, in its own words."""

    node: Id
    name: Name
    said: Line


class Weights(Message, frozen=True):
    """The latest versions of a run, newest first."""

    versions: list[VersionView]
    nodes: int
    """Nodes that are online and have any version loaded."""
    troubles: list[Trouble]
    """Of nodes that are online, those heard last first."""
    note: str
    """Why differences are large, empty where they are not."""
    now: float


class Event(Message, frozen=True):
    """One line of a story."""

    at: float
    noun: Name
    subject: Id
    before: Name
    after: Name
    detail: str


class Story(Message, frozen=True):
    """All that happened to one id."""

    subject: Id
    events: list[Event]
