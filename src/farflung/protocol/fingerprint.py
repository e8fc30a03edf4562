"""The activation fingerprint: a seeded random projection of the output head's input, of one size for any rollout.

Replay compares tokens, and a rollout of one or two tokens has few to compare. The output head's input at those
positions has hundreds of values, and a random projection keeps distances between such vectors: with r of random signs,
(r·x)² is ‖x‖² on average (Johnson & Lindenstrauss 1984; with signs Achlioptas 2003). So a few projections tell how far
the sender's activations were from the verifier's. For the first n generated tokens, n up to `POSITIONS`:

    r_t,k ∈ {-1, +1}^D    bits of SHAKE-256(nonce of the lease ‖ t): no node knows them before the lease
    s_k = 1/√n · Σ_t r_t,k · h_t/‖h_t‖      h_t (D): the last hidden state, from which token t was picked
    sent: s_k as multiples of `STEP`, one signed byte each

E[s_k²] = 1 whatever the model. A prover chooses nothing: no index, no modulus, no scale. All rollouts of a lease share
the signs, so two fingerprints of one lease differ by what their activations differ by.

Legend: T positions, D hidden size, K numbers of a fingerprint.
"""

import hashlib
from typing import Any, Final

import numpy as np

from farflung.protocol.errors import Malformed

POSITIONS: Final = 16
"""Tokens at the start of a rollout that its fingerprint covers."""
NUMBERS: Final = 32
"""Projections, and bytes, of a fingerprint; as many as a word of the hash has bits."""
STEP: Final = 1 / 32
"""Rounding adds 0.009 to a distance in quadrature, and 127 steps are 4 standard deviations of an honest number."""
MOST: Final = 127

Floats = np.ndarray[Any, np.dtype[np.float32]]


def signs(nonce: str, width: int, positions: int = POSITIONS) -> np.ndarray[Any, np.dtype[np.int8]]:
    """The signs (T, D, K) of a lease, -1 or +1, for a hidden size of `width`: bit k of the d-th little-endian word."""
    seed = bytes.fromhex(nonce)
    words = [hashlib.shake_256(seed + t.to_bytes(4, "big")).digest(4 * width) for t in range(positions)]
    bits = np.unpackbits(np.frombuffer(b"".join(words), np.uint8), bitorder="little")
    return (2 * bits.astype(np.int8) - 1).reshape(positions, width, NUMBERS)


def clipped(sketch_K: Floats) -> Floats:
    """Numbers (K,) as far as they can be sent; a verifier clips its own, or 1 honest number in 16,000 would be far."""
    return np.clip(sketch_K, -MOST * STEP, MOST * STEP)


def pack(sketch_K: Any) -> bytes:
    """A fingerprint as it is sent. Values beyond 127 steps are sent as 127."""
    return np.rint(clipped(np.asarray(sketch_K, np.float32)) / STEP).astype(np.int8).tobytes()


def unpack(sent: bytes) -> Floats:
    """The numbers (K,) of a fingerprint. Raises Malformed for another length, or a byte that `pack` never gives."""
    steps = np.frombuffer(sent, np.int8)
    if len(steps) != NUMBERS or (steps < -MOST).any():
        raise Malformed(f"a fingerprint is {NUMBERS} bytes from -{MOST} to {MOST}, this one is {sent[:40].hex()!r}")
    return steps.astype(np.float32) * np.float32(STEP)
