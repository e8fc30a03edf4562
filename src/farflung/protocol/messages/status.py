"""Views of a run for people: nodes, steps, versions of the weights, stories."""

from farflung.protocol.messages.audits import Verdict
from farflung.protocol.messages.limits import Digest, Id, Line, Message, Name
from farflung.protocol.messages.weights import Latest


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
    hardware: Line = ""
    """The machine in its own words: accelerator, memory, precision, driver, tokens a second that it expects."""


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
    breaker: str
    """Why verdicts and training are held, empty if they are not."""
    breaker_profiles: dict[str, str]
    """Why nodes under some numerics profiles get no work and are not ejected, by profile."""
    catch: dict[str, float]
    """P(a trusted node that cheats on 10 % of its rollouts is found within n submissions), by n, at the floor."""
    warnings: list[str]
    """Warnings for people, the latest last: nodes and validators with other weights than they were told."""


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


class NodeError(Message, frozen=True):
    """The last fault with weights on one node, in its own words."""

    node: Id
    name: Name
    said: Line


class Weights(Message, frozen=True):
    """The latest versions of a run, newest first."""

    versions: list[VersionView]
    nodes: int
    """Nodes that are online and have any version loaded."""
    node_errors: list[NodeError]
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
