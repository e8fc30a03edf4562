"""Versions of the weights: tensors, the shards that carry them, the sealed manifest, the relays that serve them."""

import math
from typing import Annotated, Literal

from msgspec import Meta

from farflung.protocol.messages.limits import Count, Digest, Id, Message, Name, Seconds, Step, Url

_WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1, "float8_e5m2": 1}


class Tensor(Message, frozen=True):
    """One tensor of a step, or a part of one (`NAME[0]`, `NAME[1]`, … along its first dimension), and its shard."""

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
    """A version's addition to one matrix of its base: 2^exponent · B A, of B (out, rank) and A (rank, in) in int16."""

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
    """BLAKE3 over the (name, digest) pairs of all tensors in order: the digest that the weights must come to."""
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
    """The additions to the base that `shards` hold, in the order of `tensors`; empty where they hold the weights."""

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
        """The word that people have for it; an anchor may be a difference too."""
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
