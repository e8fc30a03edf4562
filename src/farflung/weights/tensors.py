"""Worker and validator: the tensors of a version that is on disk, for an engine to load."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from farflung.engine.local import LocalEngine
from farflung.net.session import Session
from farflung.protocol.errors import WeightsError
from farflung.protocol.messages import Tensor
from farflung.protocol.stops import MOST_BYTES, STOPS, Stops
from farflung.weights.cache import Versions
from farflung.weights.manifest import check_shard
from farflung.weights.parts import joined
from farflung.weights.patch import check_tensor, stored

CONFIG_BYTES = 1 << 20


async def fetch_model_config(session: Session) -> bytes:
    """The bytes of the run's config.json, checked against its sealed descriptor."""
    data = await _fetch(session, "config.json", CONFIG_BYTES)
    if data is None:
        raise WeightsError(f"run {session.run!r} names no config.json")
    return data


async def empty_engine(
    session: Session,
    *,
    threads: int = 1,
    device: torch.device | str = "cpu",
    make: Callable[..., LocalEngine] = LocalEngine.from_folder,
) -> LocalEngine:
    """The run's model in an engine, in the type that all profiles were verified in; its weights are yet to come.

    Raises WeightsError, ConfigError.
    """
    build = await builder(session, await fetch_model_config(session), make, threads=threads, device=device)
    return build(getattr(torch, session.info.dtype))


async def builder(
    session: Session, config: bytes, make: Callable[..., LocalEngine] = LocalEngine.from_folder, **options: Any
) -> Callable[[torch.dtype], LocalEngine]:
    """Makes engines of the run's model, which ends where the run says; their weights are yet to come."""
    options |= {"eos_ids": session.info.eos_ids, "stops": await fetch_stops(session)}
    return lambda dtype: make(config, dtype=dtype, **options)


async def fetch_stops(session: Session) -> Stops | None:
    """The run's stop strings, checked against its sealed descriptor; None where it has none. Raises Malformed."""
    data = await _fetch(session, STOPS, MOST_BYTES)
    return None if data is None else Stops.unpack(data, session.info.vocab)


async def _fetch(session: Session, name: str, most_bytes: int) -> bytes | None:
    file = next((file for file in session.info.model_files if file.name == name), None)
    if file is None:
        return None
    if file.size_bytes > most_bytes:
        raise WeightsError(f"run {session.run!r} has a {name} of {file.size_bytes} bytes; at most {most_bytes} work")
    data = await session.client.download(f"/v1/blobs/{file.digest}", limit_bytes=file.size_bytes)
    check_shard(data, file.digest, file.size_bytes)
    return data


def tensors(versions: Versions, digest: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a fetched version, its bytes checked against their digest. Raises WeightsError."""
    try:
        yield from joined(_checked(versions, digest))
    except WeightsError as error:
        versions.session.stats.last_error = str(error)
        versions.discard(digest)
        raise


def _checked(versions: Versions, digest: str) -> Iterator[tuple[str, torch.Tensor]]:
    manifest = versions.known(digest)
    for pieces in stored(digest, manifest, versions.whole, versions.path):
        for tensor, values in pieces:
            check_tensor(tensor, values, manifest.step)
            yield tensor.name, _as_torch(tensor, values)


def _as_torch(tensor: Tensor, values: np.ndarray) -> torch.Tensor:
    dtype = getattr(torch, tensor.dtype)
    if not values.size:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.from_numpy(np.array(values).view(np.uint8)).view(dtype).reshape(tensor.shape)
