"""The joining of a node: its words on itself and the answer to them."""

from typing import Annotated

from msgspec import Meta

from farflung.protocol.messages.limits import MOST_DEVICES, Count, Id, Message, Name, Role, Url


class Hardware(Message, frozen=True):
    """A node's account of its machine; shown to people, believed by no role."""

    cpu: Name = ""
    cores: Annotated[int, Meta(ge=0, le=100_000)] = 0
    memory_bytes: Count = 0
    accelerator: Name = ""
    accelerator_bytes: Count = 0
    devices: Annotated[int, Meta(ge=1, le=MOST_DEVICES)] = 1
    """Of this kind, each with a process that works under the node's key."""
    driver: Name = ""
    """The driver of the accelerator, and what torch is built for."""
    precision: Name = ""
    """The shortest type that the device computes in without emulation."""
    expected_tokens_per_s: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    """As the node measured it for short answers before it worked; 0 if it did not."""


class Register(Message, frozen=True):
    """A node's first word. Its id comes from the signature."""

    version: Annotated[int, Meta(ge=0, le=10**6)]
    name: Name = ""
    role: Role = "worker"
    engine: Name = ""
    device: Name = ""
    """Kind of device that it computes on. A worker's engine and device must be those of its profile, where it says."""
    profile: Name = ""
    """Numerics profile that a worker computes in; the run's own if empty."""
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
