"""The manifest of a version: digests, and the checks that make an untrusted copy safe to load. Pure."""

from collections.abc import Callable, Iterable
from itertools import pairwise

from farflung.protocol.digest import digest_of
from farflung.protocol.errors import WeightsError
from farflung.protocol.identity import Signed, Trusted, unseal
from farflung.protocol.messages import Adapter, Manifest, Tensor

KIND = "manifest"


def target_digest(tensors: Iterable[Tensor]) -> str:
    """BLAKE3 over name, NUL, digest of every tensor in order: the digest that the weights must come to."""
    return digest_of(b"".join(one.name.encode() + b"\0" + bytes.fromhex(one.digest) for one in tensors))


def manifest_digest(signed: Signed) -> str:
    """The name of a manifest: the digest of the bytes that were signed."""
    return digest_of(signed.payload)


def open_manifest(signed: Signed, public: Trusted, run: str, digest: str) -> Manifest:
    """Check a sealed manifest against the weights keys, the run and the digest that was asked for.

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
    _refuse_broken(manifest, digest)
    return manifest


def check_follows(manifest: Manifest, parent: Manifest) -> None:
    """Raises WeightsError unless the deltas of a manifest are a difference to just these weights."""
    if manifest.base_step != parent.step:
        raise WeightsError(
            f"step {manifest.step} is a difference to step {manifest.base_step}, but its parent is step {parent.step}; "
            "publish an anchor"
        )
    if [_place(tensor) for tensor in manifest.tensors] != [_place(tensor) for tensor in parent.tensors]:
        raise WeightsError(f"step {manifest.step} is a difference, but step {parent.step} has other tensors")


def by_shard(manifest: Manifest) -> list[list[Tensor]]:
    """The tensors of each shard that holds tensors, in the manifest's order."""
    found: list[list[Tensor]] = [[] for _ in manifest.shards[: manifest.base_shards] or manifest.deltas]
    for tensor in manifest.tensors:
        found[tensor.shard].append(tensor)
    return found


def _place(tensor: Tensor) -> tuple[str, str, list[int], int]:
    return tensor.name, tensor.dtype, tensor.shape, tensor.shard


def _refuse_broken(manifest: Manifest, digest: str) -> None:
    """Shards and deltas that do not fit each other, the tensors or the steps."""
    _refuse_misfit_adapters(manifest, digest)
    counts = {len(shards) for shards in (manifest.shards[: manifest.base_shards], manifest.deltas) if shards}
    if len(counts) > 1 or any(tensor.shard >= max(counts, default=0) for tensor in manifest.tensors):
        raise WeightsError(f"manifest {digest[:12]} has tensors in shards that it does not name")
    is_difference = manifest.base_step != manifest.step
    if is_difference != bool(manifest.deltas) or manifest.base_step > manifest.step:
        raise WeightsError(f"manifest {digest[:12]} of step {manifest.step} cannot differ from {manifest.base_step}")
    if is_difference and not manifest.parent:
        raise WeightsError(f"manifest {digest[:12]} is a difference to step {manifest.base_step}, but has no parent")


def _refuse_misfit_adapters(manifest: Manifest, digest: str) -> None:
    """Adapters that do not fit the tensors, or whose shards have more or fewer bytes than they take."""
    if not manifest.adapters:
        return
    if manifest.deltas:
        raise WeightsError(f"manifest {digest[:12]} has both adapters and a difference to step {manifest.base_step}")
    places = {tensor.name: place for place, tensor in enumerate(manifest.tensors)}
    order = [places.get(adapter.name, -1) for adapter in manifest.adapters]
    if order[0] < 0 or any(first >= second for first, second in pairwise(order)):
        raise WeightsError(f"manifest {digest[:12]} adapts tensors that it does not name, or not in their order")
    taken = dict.fromkeys(range(manifest.base_shards, len(manifest.shards)), 0)
    for adapter, place in zip(manifest.adapters, order, strict=True):
        taken[adapter.shard] = taken.get(adapter.shard, 0) + _adapter_bytes(adapter, manifest.tensors[place])
    held = {number: manifest.shards[number].size_bytes for number in taken if number < len(manifest.shards)}
    if taken != held:
        raise WeightsError(f"manifest {digest[:12]} has adapters that do not take just the bytes of their shards")


def _adapter_bytes(adapter: Adapter, tensor: Tensor) -> int:
    if len(tensor.shape) != 2 or tensor.dtype != "bfloat16":
        raise WeightsError(
            f"tensor {tensor.name} is {tensor.dtype} {tensor.shape}; only bfloat16 matrices have adapters"
        )
    return 2 * adapter.rank * sum(tensor.shape)


def check_shard(data: bytes, digest: str, size_bytes: int) -> None:
    """Raises WeightsError unless these are the bytes of that shard."""
    check_hash(digest, size_bytes, len(data), lambda: digest_of(data))


def check_hash(digest: str, size_bytes: int, size: int, hashed: Callable[[], str]) -> None:
    """The same for bytes that are elsewhere: their size, and their digest, asked for if the size is right."""
    if size != size_bytes:
        raise WeightsError(f"shard {digest[:12]} has {size} bytes, its manifest says {size_bytes}")
    if (actual := hashed()) != digest:
        raise WeightsError(f"shard {digest[:12]} hashes to {actual[:12]}; download it from another source")
