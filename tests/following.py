"""A node that follows published versions, and whether it holds what was published."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from farflung.net.client import Client
from farflung.weights.cache import Versions
from farflung.weights.patch import patch
from farflung.weights.tensors import tensors
from standin import session_with


class Published(Protocol):
    """A trainer's side: where it publishes, and what it has."""

    client: Client
    digests: Sequence[str]
    published: Sequence[Mapping[str, torch.Tensor]]


@asynccontextmanager
async def node(of: Published, folder: Path, **options: Any) -> AsyncIterator[Versions]:
    async with session_with(of.client.url) as session:
        versions = Versions(session, folder, **({"patch": patch} | options))
        try:
            yield versions
        finally:
            await versions.close()


def same(versions: Versions, of: Published, step: int) -> bool:
    loaded = dict(tensors(versions, of.digests[step]))
    return loaded.keys() == of.published[step].keys() and all(
        torch.equal(tensor.view(torch.int16), of.published[step][name].view(torch.int16))
        for name, tensor in loaded.items()
    )
