"""What a version of the weights is: digests, and the checks that make an untrusted copy safe to load. Pure."""

import hashlib
from collections.abc import Iterable

from farflung.protocol.errors import WeightsError
from farflung.protocol.identity import Signed, unseal
from farflung.protocol.messages import Manifest, Tensor

KIND = "manifest"


def target_digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over name, NUL, digest of every tensor in order: what the weights must come to."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.name.encode() + b"\0" + bytes.fromhex(tensor.digest))
    return total.hexdigest()


def manifest_digest(signed: Signed) -> str:
    """The name of a manifest: SHA-256 of the bytes that were signed."""
    return hashlib.sha256(signed.payload).hexdigest()


def open_manifest(signed: Signed, public: bytes, run: str, digest: str) -> Manifest:
    """Check a sealed manifest against the weights key, the run and the digest that was asked for.

    Raises BadSignature or WeightsError.
    """
    found = manifest_digest(signed)
    if found != digest:
        raise WeightsError(f"asked for manifest {digest[:12]}, got {found[:12]}")
    manifest = unseal(signed, KIND, Manifest, public=public)
    if manifest.run != run:
        raise WeightsError(f"manifest {digest[:12]} belongs to run {manifest.run!r}, not {run!r}")
    if target_digest(manifest.tensors) != manifest.digest:
        raise WeightsError(f"manifest {digest[:12]} names tensors that do not come to its own digest")
    return manifest


def check_shard(data: bytes, digest: str, size_bytes: int) -> None:
    """Raises WeightsError unless these are the bytes of that shard."""
    if len(data) != size_bytes:
        raise WeightsError(f"shard {digest[:12]} has {len(data)} bytes, its manifest says {size_bytes}")
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise WeightsError(f"shard {digest[:12]} hashes to {found[:12]}; fetch it from somebody else")
