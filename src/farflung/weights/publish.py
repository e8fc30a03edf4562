"""Trainer: turn tensors into hashed shards, upload them, and only then seal the manifest that names them.

A step is published as the difference to the step before, and whole as well every `anchor_every` steps, or sooner when
the differences since the last anchor have come to the bytes of a whole copy. Or it is published as adapters, beside the
shards of a base that is uploaded once.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import save

from farflung.net.client import Client
from farflung.numerics.merge import Factors
from farflung.protocol.digest import digest_of
from farflung.protocol.errors import WeightsError
from farflung.protocol.identity import Key, Signed, seal
from farflung.protocol.messages import Adapter, Manifest, Shard, Tensor
from farflung.weights import adapters, delta
from farflung.weights.manifest import KIND, open_manifest, target_digest
from farflung.weights.parts import PART_BYTES, Named, joined, split

SHARD_BYTES = PART_BYTES
AT_ONCE = 2
"""Shards that are compared with those before at a time, by a thread each."""
EXPIRES_S = 30 * 24 * 3600.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Adapted:
    """Weights that are adapters on a base: which is asked for where it is not yet published."""

    base: Callable[[], Iterable[Named]]
    factors: Sequence[Factors]


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The little-endian bytes of a tensor."""
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def describe(name: str, tensor: torch.Tensor, shard: int) -> Tensor:
    """Name, type, shape and digest of one tensor."""
    digest = digest_of(tensor_bytes(tensor))
    return Tensor(name=name, dtype=_dtype(tensor), shape=list(tensor.shape), digest=digest, shard=shard)


def weights_digest(tensors: Iterable[Named], *, in_parts: bool = True) -> str:
    """The digest that these tensors come to, the large ones in parts if they travel so."""
    return target_digest(describe(name, tensor, 0) for name, tensor in (split(tensors) if in_parts else tensors))


class Publisher:
    """The version published last, as it was published: the base of the next difference.

    A trainer that was restarted gives the weights it has before it trains on; they are refused unless they come to the
    digest of the last manifest, so a difference is always to what nodes really have.
    """

    def __init__(self, client: Client, key: Key, run: str, anchor_every: int, *, in_parts: bool = True) -> None:
        """`in_parts` unless adapters are to travel: they are added to whole matrices."""
        self.client, self.key, self.run, self.anchor_every = client, key, run, anchor_every
        self.in_parts = in_parts
        self.trusted: Collection[bytes] = (key.public,)
        """Whose manifests this trainer builds on: its own, and those of the keys that its own key followed."""
        self._base: dict[str, torch.Tensor] = {}
        self._lineage_bytes = 0
        """Bytes of the differences since the last anchor."""
        self._base_shards: list[Shard] = []
        """Where steps are adapters: the base that they are added to, as uploaded."""
        self._stored: set[str] = set()
        """Shards that the last committed step names, so that they need not be sent."""

    @property
    def has_base(self) -> bool:
        """Whether it is known what the next step builds on."""
        return bool(self._base or self._base_shards or self._stored)

    @property
    def published(self) -> Mapping[str, torch.Tensor]:
        """The tensors of the last step as they were published, whole; none where they travel as adapters."""
        return dict(joined(self._base.items()))

    def forget(self) -> None:
        """The version published last was not committed: the next step is an anchor."""
        self._base, self._base_shards, self._stored = {}, [], set()

    async def rebase(self, tensors: Iterable[Named], last: str) -> None:
        """Take these tensors for the last published step, whose manifest is `last`. Raises WeightsError."""
        self._base = dict(self._split(tensors))
        lineage = [await self._manifest(last)]
        found = await asyncio.to_thread(weights_digest, self._base.items(), in_parts=False)
        if found != lineage[0].digest:
            raise WeightsError(
                f"the trainer holds {found[:12]} where step {lineage[0].step} was published as {lineage[0].digest[:12]}"
                "; resume on the hardware, torch and thread count that the run was trained with"
            )
        self._stored = {shard.digest for shard in lineage[0].shards}
        while not lineage[-1].shards:
            lineage.append(await self._manifest(lineage[-1].parent))
        self._lineage_bytes = sum(manifest.delta_bytes for manifest in lineage[:-1])

    async def publish(
        self,
        tensors: Iterable[Named],
        *,
        step: int,
        parent: str,
        commitment: str,
        now: float,
        adapted: Adapted | None = None,
    ) -> Signed:
        """Upload every shard of this step, then seal its manifest (which is not sent: committing the step does that).

        `adapted` is what the tensors are made of, where that is to travel instead of them.
        """
        described, made_of = await (
            self._differing(tensors, step) if adapted is None else self._adapting(tensors, adapted)
        )
        manifest = Manifest(
            run=self.run,
            step=step,
            base_step=step - 1 if made_of.get("deltas") else step,
            parent=parent,
            digest=target_digest(described),
            tensors=described,
            secret_commitment=commitment,
            made_at=now,
            expires_at=now + EXPIRES_S,
            **made_of,
        )
        return seal(self.key, KIND, manifest)

    async def _differing(self, tensors: Iterable[Named], step: int) -> tuple[list[Tensor], dict[str, Any]]:
        """Tensors, which replace those of the step before, as difference or whole; taken a few shards at a time."""
        is_based, numbered = bool(self._base), enumerate(_chunks(self._split(tensors)))
        described_chunks: list[tuple[list[Tensor], Shard | None]] = []
        while some := await asyncio.to_thread(list, islice(numbered, AT_ONCE)):
            described_chunks += await asyncio.gather(*(self._tell(chunk, number, is_based) for number, chunk in some))
            for _, chunk in some:
                self._base |= dict(chunk)
        described = [tensor for tensors, _ in described_chunks for tensor in tensors]
        deltas = [shard for _, shard in described_chunks if shard is not None]
        size = sum(tensor.nbytes for tensor in self._base.values())
        if sum(shard.size_bytes for shard in deltas) >= size:
            deltas = []
        self._lineage_bytes += sum(shard.size_bytes for shard in deltas)
        is_anchor = not is_based or step % self.anchor_every == 0 or self._lineage_bytes >= size or not deltas
        shards = [await self._upload(data) async for data in _whole(self._base.items())] if is_anchor else []
        self._lineage_bytes = 0 if is_anchor else self._lineage_bytes
        return described, {"shards": shards, "deltas": deltas}

    async def _tell(self, chunk: list[Named], number: int, is_based: bool) -> tuple[list[Tensor], Shard | None]:
        """One shard's tensors, and their difference to those before."""
        described = await asyncio.to_thread(_describe_all, chunk, number)
        shard = await self._upload(await asyncio.to_thread(self._difference, chunk)) if is_based else None
        return described, shard

    async def _adapting(self, tensors: Iterable[Named], adapted: Adapted) -> tuple[list[Tensor], dict[str, Any]]:
        """Tensors as adapters beside their base; adapters that add nothing are left out."""
        described: list[Tensor] = []
        for number, chunk in enumerate(_chunks(tensors)):
            described += await asyncio.to_thread(_describe_all, chunk, number)
        self._base = {}
        if not self._base_shards:
            self._base_shards = [await self._upload(data, self._stored) async for data in _whole(adapted.base())]
        shards, named = list(self._base_shards), list[Adapter]()
        for chunk in _runs((one for one in adapted.factors if one.B.any()), lambda one: one.B.nbytes + one.A.nbytes):
            named += [
                Adapter(name=one.name, rank=one.B.shape[1], exponent=one.exponent, shard=len(shards)) for one in chunk
            ]
            shards.append(await self._upload(await asyncio.to_thread(adapters.pack, chunk)))
        return described, {"shards": shards, "adapters": named}

    def _split(self, tensors: Iterable[Named]) -> Iterable[Named]:
        """On the CPU, each copied there once: what is kept of a step takes no memory of the trainer's device."""
        here = ((name, tensor.cpu()) for name, tensor in tensors)
        return split(here) if self.in_parts else here

    def _difference(self, chunk: list[Named]) -> bytes:
        return delta.encode([_ints(self._base[name]) for name, _ in chunk], [_ints(tensor) for _, tensor in chunk])

    async def _upload(self, data: bytes, stored: Collection[str] = ()) -> Shard:
        shard = Shard(digest=await asyncio.to_thread(digest_of, data), size_bytes=len(data))
        if shard.digest not in stored:
            await self.client.put(f"/v1/runs/{self.run}/blobs/{shard.digest}", data)
        return shard

    async def _manifest(self, digest: str) -> Manifest:
        signed = await self.client.get(f"/v1/runs/{self.run}/manifests/{digest}", Signed)
        return open_manifest(signed, self.trusted, self.run, digest)


async def _whole(tensors: Iterable[Named]) -> AsyncIterator[bytes]:
    """The shards of whole tensors."""
    for chunk in _chunks(tensors):
        yield await asyncio.to_thread(save, {name: tensor.cpu().contiguous() for name, tensor in chunk})


def _describe_all(chunk: list[Named], shard: int) -> list[Tensor]:
    return [describe(name, tensor, shard) for name, tensor in chunk]


def _ints(tensor: torch.Tensor) -> np.ndarray:
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    return delta.as_ints(flat.view(torch.uint8).numpy(), tensor.element_size())


def _dtype(tensor: torch.Tensor) -> Any:
    return str(tensor.dtype).removeprefix("torch.")


def _chunks(tensors: Iterable[Named]) -> Iterator[list[Named]]:
    return _runs(tensors, lambda named: named[1].nbytes)


def _runs(items: Iterable[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Items that stand together, as many as fit a shard."""
    chunk: list[T] = []
    size = 0
    for item in items:
        if chunk and size + size_of(item) > SHARD_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(item)
        size += size_of(item)
    if chunk:
        yield chunk
