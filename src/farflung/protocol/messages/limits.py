"""Everything that crosses a machine, once, as bounded structs: the wire, the OpenAPI and the docs come from here.

Every string and list has a bound and unknown fields are refused. Token ids travel as little-endian uint32 bytes
(base64 in JSON), floats per token as little-endian float32 bytes. Times are Unix seconds. Patterns end in `(?!\\n)$`
because Python's `$` alone also matches before a last line feed.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from farflung.protocol.seeds import SEED_BITS

VERSION = 5
"""Spoken protocol version; a node with another is told what to do."""

MAX_TOKENS = 131_072
MAX_SAMPLES = 4_096
MOST_END_TOKENS = 64
MOST_DEVICES = 64
LANES = 2
"""Leases that each device of a node may hold, so that a server is given the next before it has ended the one before."""
TRANSCRIPT_CHARS = 8 * MAX_TOKENS

Id = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,63}(?!\n)$")]
MaybeId = Annotated[str, Meta(pattern=r"^([a-z0-9][a-z0-9-]{0,63})?(?!\n)$")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}(?!\n)$")]
MaybeDigest = Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?(?!\n)$")]
Name = Annotated[str, Meta(max_length=80, pattern=r"^[\w .:/+@()-]*(?!\n)$")]
Line = Annotated[str, Meta(max_length=500)]
Ids = Annotated[bytes, Meta(max_length=4 * MAX_TOKENS)]
Floats = Annotated[bytes, Meta(max_length=4 * MAX_TOKENS)]
Public = Annotated[bytes, Meta(min_length=32, max_length=32)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Seconds = Annotated[float, Meta(ge=0, le=1e12)]
Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]
Step = Annotated[int, Meta(ge=0, le=10**9)]
Seed = Annotated[int, Meta(ge=0, lt=2**SEED_BITS)]
Temperature = Annotated[float, Meta(ge=0, le=10)]
TokenLimit = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
"""Most new tokens of a rollout."""
Device = Annotated[int, Meta(ge=0, lt=MOST_DEVICES)]
"""Which of a node's devices, counted from 0; and beyond their number once more, for the second lease of each."""
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
