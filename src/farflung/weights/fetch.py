"""Worker and validator: the tensors of a version that is on disk, for an engine to load."""

import hashlib
from collections.abc import Iterator

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from farflung.protocol.errors import WeightsError
from farflung.protocol.messages import Manifest, Shard
from farflung.protocol.session import Session
from farflung.weights.cache import Versions
from farflung.weights.manifest import check_shard
from farflung.weights.publish import tensor_bytes

CONFIG_BYTES = 1 << 20


async def fetch_model_config(session: Session) -> bytes:
    """The bytes of the run's config.json, checked against its sealed papers."""
    file = next((file for file in session.info.model_files if file.name == "config.json"), None)
    if file is None or file.size_bytes > CONFIG_BYTES:
        raise WeightsError(f"run {session.run!r} names no config.json of at most {CONFIG_BYTES} bytes")
    data = await session.client.download(f"/v1/blobs/{file.digest}", limit_bytes=file.size_bytes)
    check_shard(data, file.digest, file.size_bytes)
    return data


def tensors(versions: Versions, manifest: Manifest) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a fetched manifest, its bytes checked against their digest. Raises WeightsError."""
    for number, shard in enumerate(manifest.shards):
        named = [tensor for tensor in manifest.tensors if tensor.shard == number]
        loaded = _read(versions, shard)
        if set(loaded) != {tensor.name for tensor in named}:
            raise WeightsError(f"shard {shard.digest[:12]} does not hold the tensors its manifest names")
        for tensor in named:
            value = loaded[tensor.name]
            if hashlib.sha256(tensor_bytes(value)).hexdigest() != tensor.digest:
                raise WeightsError(f"tensor {tensor.name} of step {manifest.step} does not match its digest")
            yield tensor.name, value


def _read(versions: Versions, shard: Shard) -> dict[str, torch.Tensor]:
    try:
        data = versions.path(shard.digest).read_bytes()
        check_shard(data, shard.digest, shard.size_bytes)
        return load(data)
    except WeightsError:
        versions.discard(shard.digest)
        raise
    except (OSError, SafetensorError) as error:
        versions.discard(shard.digest)
        raise WeightsError(f"shard {shard.digest[:12]} cannot be read from {versions.folder}: {error}") from error
