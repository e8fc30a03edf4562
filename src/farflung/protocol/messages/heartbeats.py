"""A node at work: its heartbeat, and the word on its status in return."""

from typing import Annotated, Literal

from msgspec import Meta

from farflung.protocol.messages.limits import Count, Device, Id, Line, MaybeDigest, MaybeId, Message, Name, Seconds
from farflung.protocol.messages.weights import Latest


class Heartbeat(Message, frozen=True):
    """Still here. Figures are metrics, but for those of the lease at work, which put off its end for a while."""

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
    work_device_s: Seconds = 0.0
    """Seconds that accelerators took for the same as `work_cpu_s`; so are the next three. 0 without one."""
    recent_device_s: Seconds = 0.0
    made_device_s: Seconds = 0.0
    proof_device_s: Seconds = 0.0
    sync_pause_s: Seconds = 0.0
    started_at: Seconds = 0.0
    device: Device = 0
    """The device of the process that is still here."""
    lease: MaybeId = ""
    """The lease that it works on, empty for none."""
    made: Count = 0
    """Rises while that lease is generated, at best with every token."""
    fetched_bytes: Count = 0
    """Bytes of weights that it fetched since it started."""
    last_error: Line = ""
    """The last fault with weights on this node, such as a relay that lied, in its own words."""


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


class HeartbeatReply(Message, frozen=True):
    """Answer to a heartbeat."""

    latest: Latest
    status: Name
    """The node's status."""
    clean: Count = 0
    """Clean audited rollouts in a row of a worker on probation."""
    needed: Count = 0
    """How many end probation; 0 for roles of which no trust is kept."""
    rulings: Annotated[list[Ruling], Meta(max_length=8)] = []
    """The latest verdicts on the node, oldest first."""
    lease_left_s: Seconds = 0.0
    """Until the lease that the heartbeat names lapses, unless it makes progress; 0 for one that is not open."""
    lost_leases: Annotated[list[Id], Meta(max_length=1000)] = []
