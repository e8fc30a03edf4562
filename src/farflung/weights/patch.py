"""Worker, validator and trainer: the bytes of a version from an older one and the deltas since, or base and adapters.

A patched version is one file, `<manifest>.whole`: the little-endian bytes of all tensors, shard by shard, each in the
manifest's order. It is written beside its place, and renamed only when every tensor came to its digest.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize

from farflung.protocol.digest import digest_of
from farflung.protocol.errors import WeightsError
from farflung.protocol.messages import Manifest, Tensor
from farflung.weights import delta
from farflung.weights.adapters import merged, read
from farflung.weights.manifest import by_shard, check_shard
from farflung.weights.plan import FetchPlan

ShardPath = Callable[[str], Path]
Piece = tuple[Tensor, np.ndarray]
"""A tensor and its values as unsigned integers."""


def patch(plan: FetchPlan, whole: Callable[[str], Path], path: ShardPath) -> None:
    """Write the last version of a plan. Memory: one shard of the start, its adapters, and what one tensor becomes.

    Raises WeightsError, and leaves nothing behind, where a tensor does not come to its digest.
    """
    digest, manifest = plan.last
    draft = whole(digest).with_suffix(".draft")
    try:
        with draft.open("wb") as file:
            for tensor, values in _patched(plan, whole, path):
                check_tensor(tensor, values, manifest.step)
                file.write(values)
        draft.rename(whole(digest))
    except OSError as error:
        raise WeightsError(f"step {manifest.step} cannot be patched in {draft.parent}: {error.strerror}") from error
    finally:
        draft.unlink(missing_ok=True)


def stored(digest: str, manifest: Manifest, whole: Callable[[str], Path], path: ShardPath) -> Iterator[list[Piece]]:
    """The tensors of a version at hand, shard by shard; not checked against their digests. Raises WeightsError."""
    if whole(digest).exists():
        yield from _from_whole(whole(digest), manifest)
        return
    if not manifest.shards:
        raise WeightsError(f"step {manifest.step} is no anchor, and its patched copy is gone; fetch it anew")
    adapters = read(manifest, path)
    for shard, tensors in zip(manifest.shards[: manifest.base_shards], by_shard(manifest), strict=True):
        pieces = _from_shard(path(shard.digest), shard.digest, shard.size_bytes, tensors)
        yield [(one, merged(one, values, adapters.get(one.name))) for one, values in pieces]


def check_tensor(tensor: Tensor, values: np.ndarray, step: int) -> None:
    """Raises WeightsError unless these are the bytes of that tensor."""
    found = digest_of(values.view(np.uint8).data)
    if found != tensor.digest:
        raise WeightsError(f"tensor {tensor.name} of step {step} does not match its digest")


def _patched(plan: FetchPlan, whole: Callable[[str], Path], path: ShardPath) -> Iterator[Piece]:
    manifest = plan.last[1]
    base = stored(*plan.start, whole, path)
    for number, (tensors, pieces) in enumerate(zip(by_shard(manifest), base, strict=True)):
        sizes = [(tensor.values, tensor.width) for tensor in tensors]
        values: Iterator[np.ndarray] = (values for _, values in pieces)
        for _, between in plan.steps:
            shard = between.deltas[number]
            data = _read(path(shard.digest))
            check_shard(data, shard.digest, shard.size_bytes)
            values = delta.decode(data, values, sizes)
        yield from zip(tensors, values, strict=True)


def _from_whole(file: Path, manifest: Manifest) -> Iterator[list[Piece]]:
    size = file.stat().st_size
    if size != manifest.full_bytes:
        raise WeightsError(f"{file.name} has {size:,} bytes, step {manifest.step} has {manifest.full_bytes:,}")
    data, at = np.memmap(file, np.uint8, "r") if size else np.zeros(0, np.uint8), 0
    for tensors in by_shard(manifest):
        pieces: list[Piece] = []
        for tensor in tensors:
            end = at + tensor.values * tensor.width
            pieces.append((tensor, delta.as_ints(data[at:end], tensor.width)))
            at = end
        yield pieces


def _from_shard(file: Path, digest: str, size_bytes: int, tensors: list[Tensor]) -> list[Piece]:
    data = _read(file)
    check_shard(data, digest, size_bytes)
    try:
        found = {name: held["data"] for name, held in deserialize(data)}
    except SafetensorError as error:
        raise WeightsError(f"shard {digest[:12]} is no safetensors file: {error}") from error
    if set(found) != {tensor.name for tensor in tensors}:
        raise WeightsError(f"shard {digest[:12]} does not hold the tensors its manifest names")
    for tensor in tensors:
        if len(found[tensor.name]) != tensor.values * tensor.width:
            raise WeightsError(f"tensor {tensor.name} in shard {digest[:12]} has another size than its manifest says")
    return [(tensor, delta.as_ints(found[tensor.name], tensor.width)) for tensor in tensors]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise WeightsError(f"{file.name[:12]} cannot be read from {file.parent}: {error.strerror}") from error
