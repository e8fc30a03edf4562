"""Trainer: adapters as shards. Worker and validator: the tensors of a version from its base and its adapters.

A shard of adapters is their numbers and nothing else: of each, in the manifest's order, B (out, rank) row by row and
then A (rank, in), little-endian int16. Shapes and bytes are known from the manifest before a byte is fetched.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from farflung.numerics.merge import Factors, merge
from farflung.protocol.errors import WeightsError
from farflung.protocol.messages import Adapter, Manifest, Tensor
from farflung.weights.manifest import check_shard

_INT16 = np.dtype("<i2")


def pack(adapters: Iterable[Factors]) -> bytes:
    """The bytes of a shard."""
    return b"".join(part.cpu().numpy().astype(_INT16).tobytes() for one in adapters for part in (one.B, one.A))


def read(manifest: Manifest, path: Callable[[str], Path]) -> dict[str, Factors]:
    """All adapters of a version by the tensors they are added to, from its shards on disk. Raises WeightsError."""
    shapes = {tensor.name: tensor.shape for tensor in manifest.tensors}
    found: dict[str, Factors] = {}
    for number, shard in enumerate(manifest.shards[manifest.base_shards :], manifest.base_shards):
        try:
            data = path(shard.digest).read_bytes()
        except OSError as error:
            raise WeightsError(f"{shard.digest[:12]} cannot be read: {error.strerror}") from error
        check_shard(data, shard.digest, shard.size_bytes)
        mine = [one for one in manifest.adapters if one.shard == number]
        found |= {one.name: one for one in _unpack(data, mine, shapes)}
    return found


def merged(tensor: Tensor, values: np.ndarray, adapter: Factors | None) -> np.ndarray:
    """A tensor of the base with its adapter, if it has one; flat unsigned integers both. Raises WeightsError."""
    if adapter is None or not values.size:
        return values
    base = torch.from_numpy(np.array(values).view(np.int16)).view(torch.bfloat16).reshape(tensor.shape)
    return merge(base, adapter).view(torch.int16).numpy().view(values.dtype).reshape(-1)


def _unpack(data: bytes, adapters: list[Adapter], shapes: dict[str, list[int]]) -> Iterator[Factors]:
    """A shard's adapters; the manifest's own check vouches that it has just their bytes."""
    at = 0
    for adapter in adapters:
        height, width = shapes[adapter.name]
        parts: list[torch.Tensor] = []
        for shape in ((height, adapter.rank), (adapter.rank, width)):
            count = shape[0] * shape[1]
            values = np.frombuffer(data, _INT16, count, at).astype(np.int16) if count else np.zeros(0, np.int16)
            parts.append(torch.from_numpy(values).reshape(shape))
            at += count * _INT16.itemsize
        yield Factors(adapter.name, adapter.exponent, *parts)
