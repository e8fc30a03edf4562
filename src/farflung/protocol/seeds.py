"""Every secret-derived number, each by HMAC-SHA256 under its own label.

    run secret ─▶ step secret ─┬─▶ seed of a sample          (what noise a rollout is generated with)
                               ├─▶ task key ─┬─▶ task order  (which tasks the step opens)
                               │             └─▶ curriculum  (which of them it opens first)
                               ├─▶ audit key ─▶ audit draws  (which rollouts are replayed)
                               ├─▶ probe key ─▶ probe        (which slices of the weights an engine is asked for)
                               ├─▶ canary key ─▶ canaries    (what validators are tried on)
                               └─▶ commitment                (published with the step's manifest)

Everything hangs from the step secret, so its reveal, once the step can no longer be trained on, lets anyone check the
commitment and recompute seeds, order and draws; and it gives away nothing of another step, nor of the run secret.

Derivation: HMAC-SHA256(key, e(label) ‖ e(part 1) ‖ …) with e(x) = length of x as 4 bytes big-endian ‖ x, text as
UTF-8 and integers as 8 bytes big-endian unsigned. The lengths make it injective: ("ab", "c") and ("a", "bc") differ.
"""

import hashlib
import hmac
from functools import lru_cache
from typing import Final

from farflung.protocol.errors import ConfigError

SECRET_BYTES: Final = 32
"""Length of every secret and key here. HMAC pads short keys with zeros, so that of two lengths two could collide."""
SEED_BITS: Final = 53
"""Of a seed: not negative in 64 bits with a sign, which engines take, and exact as a JavaScript number."""


def derive(key: bytes, label: str, *parts: bytes | str | int) -> bytes:
    """32 bytes that only holders of `key` can compute; a different label or part gives unrelated ones."""
    if len(key) != SECRET_BYTES:
        raise ConfigError(f"a secret has {SECRET_BYTES} bytes, this one {len(key)}; make one with secrets.token_bytes")
    return hmac.digest(key, _prefix(label) + encode(*parts), "sha256")


@lru_cache(maxsize=256)
def _prefix(label: str) -> bytes:
    return encode("farflung " + label)


def encode(*parts: bytes | str | int) -> bytes:
    """Join parts so that no two different lists of parts of the same types give the same bytes."""
    raw = [_bytes(part) for part in parts]
    return b"".join([len(part).to_bytes(4, "big") + part for part in raw])


def _bytes(part: bytes | str | int) -> bytes:
    if isinstance(part, int):
        return part.to_bytes(8, "big")
    return part.encode() if isinstance(part, str) else part


def step_secret(run_secret: bytes, step: int) -> bytes:
    """The secret of one policy step."""
    return derive(run_secret, "step secret", step)


def commitment(step_secret: bytes) -> bytes:
    """SHA-256 that binds the coordinator to a step secret before anybody can know it.

    It hides as well, because a step secret has 256 bits of entropy.
    """
    return hashlib.sha256(encode("farflung commitment", step_secret)).digest()


def sample_seed(step_secret: bytes, task_id: str, sample: int) -> int:
    """The seed of one sample, of 53 bits, the same for every node and unknowable before the lease."""
    return number(derive(step_secret, "sample seed", task_id, sample))


def number(derived: bytes) -> int:
    """The first 53 bits of derived bytes as a number."""
    return int.from_bytes(derived[:8], "big") >> (64 - SEED_BITS)


def task_key(step_secret: bytes) -> bytes:
    """The key of the step's task order."""
    return derive(step_secret, "task key")


def probe_key(step_secret: bytes) -> bytes:
    """The key that chooses which slices of the step's weights an engine is asked for."""
    return derive(step_secret, "probe key")


def canary_key(step_secret: bytes) -> bytes:
    """The key of the step's canaries: their tasks, seeds and names."""
    return derive(step_secret, "canary key")


def audit_key(step_secret: bytes) -> bytes:
    """The key of the step's audit draws. A worker who had it could choose a body that is not drawn."""
    return derive(step_secret, "audit key")
