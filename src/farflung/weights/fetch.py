"""Worker and validator: get the shards of a manifest, refuse whatever is not what it names, give tensors to an engine.

Shards are kept in a folder under their digest, written beside and renamed, so a crash leaves no half shard and the
next start downloads nothing twice.
"""

import asyncio
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from farflung.protocol.client import Client
from farflung.protocol.errors import WeightsError
from farflung.protocol.identity import Signed
from farflung.protocol.messages import Manifest, Shard
from farflung.protocol.session import Session
from farflung.weights.manifest import check_shard, open_manifest
from farflung.weights.publish import tensor_bytes

AT_ONCE = 4


async def fetch_model_config(session: Session) -> bytes:
    """The bytes of the run's config.json, checked against its sealed papers."""
    file = next((file for file in session.info.model_files if file.name == "config.json"), None)
    if file is None:
        raise WeightsError(f"run {session.run!r} names no config.json among its model files")
    data = await session.client.download(f"/v1/blobs/{file.digest}")
    check_shard(data, file.digest, file.size_bytes)
    return data


class Weights:
    """The versions that one node has on its disk."""

    def __init__(self, client: Client, folder: Path, *, run: str, public: bytes, keep: int = 3) -> None:
        self.client, self.folder, self.run, self.public, self.keep = client, folder, run, public, keep
        self._manifests: dict[str, Manifest] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        folder.mkdir(parents=True, exist_ok=True)

    async def fetch(self, digest: str) -> Manifest:
        """Have every shard of this manifest on disk, checked. Safe to call twice at once."""
        async with self._locks.setdefault(digest, asyncio.Lock()):
            if digest not in self._manifests:
                signed = await self.client.get(f"/v1/runs/{self.run}/manifests/{digest}", Signed)
                manifest = open_manifest(signed, self.public, self.run, digest)
                await self._shards(manifest)
                self._manifests[digest] = manifest
        return self._use(digest)

    def _use(self, digest: str) -> Manifest:
        """Mark a version as the one used last, and forget those not used for longest."""
        self._manifests[digest] = self._manifests.pop(digest)
        for old in list(self._manifests)[: -self.keep]:
            del self._manifests[old]
        self._collect()
        return self._manifests[digest]

    def known(self, digest: str) -> Manifest:
        """A manifest that was fetched. Raises WeightsError."""
        if digest not in self._manifests:
            raise WeightsError(f"manifest {digest[:12]} was not fetched, or dropped for newer ones; fetch it first")
        return self._manifests[digest]

    def tensors(self, manifest: Manifest) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of a fetched manifest, its bytes checked against their digest. Raises WeightsError."""
        named = {number: [t for t in manifest.tensors if t.shard == number] for number in range(len(manifest.shards))}
        for number, shard in enumerate(manifest.shards):
            loaded = self._read(shard)
            if set(loaded) != {tensor.name for tensor in named[number]}:
                raise WeightsError(f"shard {shard.digest[:12]} does not hold the tensors its manifest names")
            for tensor in named[number]:
                value = loaded[tensor.name]
                if hashlib.sha256(tensor_bytes(value)).hexdigest() != tensor.digest:
                    raise WeightsError(f"tensor {tensor.name} of step {manifest.step} does not match its digest")
                yield tensor.name, value

    async def _shards(self, manifest: Manifest) -> None:
        limit = asyncio.Semaphore(AT_ONCE)

        async def one(shard: Shard) -> None:
            async with limit:
                await self._shard(shard)

        await asyncio.gather(*(one(shard) for shard in manifest.shards))

    async def _shard(self, shard: Shard) -> None:
        path = self.folder / shard.digest
        if path.exists() and path.stat().st_size == shard.size_bytes:
            return
        data = await self.client.download(f"/v1/blobs/{shard.digest}")
        check_shard(data, shard.digest, shard.size_bytes)
        partial = path.with_suffix(f".{os.getpid()}.part")
        partial.write_bytes(data)
        partial.rename(path)

    def _read(self, shard: Shard) -> dict[str, torch.Tensor]:
        try:
            data = (self.folder / shard.digest).read_bytes()
            check_shard(data, shard.digest, shard.size_bytes)
            return load(data)
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"shard {shard.digest[:12]} cannot be read from {self.folder}: {error}") from error

    def _collect(self) -> None:
        """Delete the shards that no remembered version needs."""
        wanted = {shard.digest for manifest in self._manifests.values() for shard in manifest.shards}
        for path in self.folder.iterdir():
            if path.name not in wanted and not path.name.endswith(".part"):
                path.unlink(missing_ok=True)
