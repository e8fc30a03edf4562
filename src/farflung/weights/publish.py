"""Trainer: turn tensors into hashed shards, upload them, and only then seal the manifest that names them."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from safetensors.torch import save

from farflung.protocol.client import Client
from farflung.protocol.identity import Key, Signed, seal
from farflung.protocol.messages import Manifest, Shard, Tensor
from farflung.weights.manifest import KIND, target_digest

SHARD_BYTES = 64 << 20
EXPIRES_S = 30 * 24 * 3600.0

Named = tuple[str, torch.Tensor]


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The little-endian bytes of a tensor."""
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def describe(name: str, tensor: torch.Tensor, shard: int) -> Tensor:
    """Name, type, shape and digest of one tensor."""
    digest = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
    return Tensor(name=name, dtype=_dtype(tensor), shape=list(tensor.shape), digest=digest, shard=shard)


def digest_of(tensors: Iterable[Named]) -> str:
    """What these tensors come to."""
    return target_digest(describe(name, tensor, 0) for name, tensor in tensors)


async def publish(
    client: Client, key: Key, tensors: Iterable[Named], *, run: str, step: int, parent: str, commitment: str, now: float
) -> Signed:
    """Upload every shard of this step, then seal its manifest (which is not sent: committing the step does that)."""
    described: list[Tensor] = []
    shards: list[Shard] = []
    for number, chunk in enumerate(_chunks(tensors)):
        data = save({name: tensor.contiguous() for name, tensor in chunk})
        shard = Shard(digest=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
        await client.put(f"/v1/runs/{run}/blobs/{shard.digest}", data)
        shards.append(shard)
        described += [describe(name, tensor, number) for name, tensor in chunk]
    manifest = Manifest(
        run=run,
        step=step,
        base_step=step,
        parent=parent,
        digest=target_digest(described),
        tensors=described,
        shards=shards,
        secret_commitment=commitment,
        made_at=now,
        expires_at=now + EXPIRES_S,
    )
    return seal(key, KIND, manifest)


def _dtype(tensor: torch.Tensor) -> Any:
    return str(tensor.dtype).removeprefix("torch.")


def _chunks(tensors: Iterable[Named]) -> Iterator[list[Named]]:
    chunk: list[Named] = []
    size = 0
    for name, tensor in tensors:
        if chunk and size + tensor.nbytes > SHARD_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append((name, tensor))
        size += tensor.nbytes
    if chunk:
        yield chunk
