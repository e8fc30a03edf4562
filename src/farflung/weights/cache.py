"""Worker, validator and relay: versions of the weights on this machine's disk, every byte checked before it is kept.

Shards are kept in a folder under their digest, written beside and renamed, so a crash leaves no half shard and the
next start downloads nothing twice. They come from whichever source answers; none of them needs to be trusted.
"""

import asyncio
import logging
import os
import random
import shutil
import time
from pathlib import Path

from farflung.protocol.client import Client
from farflung.protocol.errors import ConfigError, FarflungError, Refusal, Unreachable, WeightsError
from farflung.protocol.identity import Signed
from farflung.protocol.messages import Manifest, Relays, Shard
from farflung.protocol.session import Session
from farflung.weights import sources
from farflung.weights.manifest import check_shard, open_manifest

log = logging.getLogger(__name__)
AT_ONCE = 4
RELAYS_EVERY_S = 10.0
RELAY_S = 5.0
RELAYS_TRIED = 3
"""Relays that are tried for one shard before the origin: any number of them may be dead."""
SLOWEST_BYTES_PER_S = 250_000
"""A relay that takes longer than RELAY_S and this speed allow is given up: a slow drip must not hold a node."""
SPARE_BYTES = 256 << 20
"""Disk that is never filled."""


class Versions:
    """The versions of one run's weights that this node has, the newest used ones kept.

    `limit_bytes` bounds what the folder may hold; a manifest that would need more is refused before a byte is fetched.
    """

    def __init__(
        self, session: Session, folder: Path, *, keep: int = 3, limit_bytes: int = 0, use_relays: bool = True
    ) -> None:
        self.session, self.folder, self.keep, self.limit_bytes = session, folder, keep, limit_bytes
        self._known: dict[str, Manifest] = {}
        self._coming: dict[str, Manifest] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._scores: dict[str, sources.Score] = {}
        self._relays: dict[str, Client] = {}
        self._asked_at = 0.0 if use_relays else float("inf")
        self._rng = random.Random(session.client.key.id)
        folder.mkdir(parents=True, exist_ok=True)

    async def fetch(self, digest: str) -> Manifest:
        """Have every shard of this manifest on disk, safe to call twice at once. Raises WeightsError, BadSignature."""
        async with self._locks.setdefault(digest, asyncio.Lock()):
            if digest not in self._known:
                manifest = await self._manifest(digest)
                self._refuse_oversize(manifest)
                self._coming[digest] = manifest
                try:
                    await self._shards(manifest)
                    self._known[digest] = manifest
                finally:
                    del self._coming[digest]
        return self._use(digest)

    async def close(self) -> None:
        """Hang up on all relays."""
        for relay in self._relays.values():
            await relay.close()

    def known(self, digest: str) -> Manifest:
        """A manifest that was fetched. Raises WeightsError."""
        if digest not in self._known:
            raise WeightsError(f"manifest {digest[:12]} was not fetched, or dropped for newer ones; fetch it first")
        return self._known[digest]

    def has(self, digest: str) -> bool:
        """Whether a manifest was fetched and is still here."""
        return digest in self._known

    def discard(self, shard: str) -> None:
        """Give up a shard that the disk lost or changed; the versions that need it are fetched anew."""
        self.path(shard).unlink(missing_ok=True)
        for digest, manifest in list(self._known.items()):
            if any(shard == s.digest for s in manifest.shards):
                del self._known[digest]

    def is_wanted(self, shard: str) -> bool:
        """Whether a shard belongs to a version that is here or on its way."""
        return any(shard == s.digest for manifest in self._kept() for s in manifest.shards)

    def path(self, shard: str) -> Path:
        """Where a shard is, or will be."""
        return self.folder / shard

    def _kept(self) -> list[Manifest]:
        return [*self._known.values(), *self._coming.values()]

    def _use(self, digest: str) -> Manifest:
        """Mark a version as the one used last, and forget those not used for longest."""
        self._known[digest] = self._known.pop(digest)
        for old in list(self._known)[: -self.keep]:
            del self._known[old]
        for path in self.folder.iterdir():
            if not path.name.endswith(".part") and not self.is_wanted(path.name):
                path.unlink(missing_ok=True)
        return self._known[digest]

    def _refuse_oversize(self, manifest: Manifest) -> None:
        need = sum(shard.size_bytes for shard in manifest.shards if not self.path(shard.digest).exists())
        total = sum(shard.size_bytes for shard in manifest.shards)
        if self.limit_bytes and total > self.limit_bytes:
            raise WeightsError(
                f"step {manifest.step} takes {total:,} bytes of disk, this node allows {self.limit_bytes:,}"
            )
        free = shutil.disk_usage(self.folder).free - SPARE_BYTES
        if need > free:
            raise WeightsError(
                f"step {manifest.step} needs {need:,} bytes more disk, {free:,} are free in {self.folder}"
            )

    async def _manifest(self, digest: str) -> Manifest:
        signed = await self.session.client.get(self.session.path(f"manifests/{digest}"), Signed)
        return open_manifest(signed, self.session.weights_key, self.session.run, digest)

    # --- shards ------------------------------------------------------------------------------------------------------

    async def _shards(self, manifest: Manifest) -> None:
        await self._learn_relays()
        limit = asyncio.Semaphore(AT_ONCE)

        async def one(shard: Shard) -> None:
            async with limit:
                if not self.path(shard.digest).exists():
                    self._keep(shard, await self._download(shard))

        await asyncio.gather(*(one(shard) for shard in manifest.shards))

    async def _download(self, shard: Shard) -> bytes:
        """A shard's bytes, from the first relay that has them right, else from the origin."""
        for url in sources.order(self._relays, self._scores, self._rng)[:RELAYS_TRIED]:
            before = time.monotonic()
            try:
                async with asyncio.timeout(RELAY_S + shard.size_bytes / SLOWEST_BYTES_PER_S):
                    data = await self._relays[url].download(f"/v1/blobs/{shard.digest}", limit_bytes=shard.size_bytes)
                check_shard(data, shard.digest, shard.size_bytes)
            except (Unreachable, Refusal, WeightsError, TimeoutError) as error:
                log.warning("relay failed url=%s shard=%s because=%s", url, shard.digest[:12], error or "too slow")
                self._scores[url] = sources.failed(self._scores.get(url, sources.Score()))
                continue
            took_s = time.monotonic() - before
            self._scores[url] = sources.succeeded(self._scores.get(url, sources.Score()), len(data), took_s)
            return data
        data = await self.session.client.download(f"/v1/blobs/{shard.digest}", limit_bytes=shard.size_bytes)
        check_shard(data, shard.digest, shard.size_bytes)
        return data

    def _keep(self, shard: Shard, data: bytes) -> None:
        partial = self.folder / f"{shard.digest}.{os.getpid()}.part"
        try:
            partial.write_bytes(data)
            partial.rename(self.path(shard.digest))
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise WeightsError(
                f"shard {shard.digest[:12]} cannot be kept in {self.folder}: {error.strerror}"
            ) from error

    async def _learn_relays(self) -> None:
        """Ask the coordinator, now and then, which relays there are."""
        if time.monotonic() - self._asked_at < RELAYS_EVERY_S:
            return
        self._asked_at = time.monotonic()
        try:
            found = await self.session.client.get(self.session.path("relays"), Relays)
        except FarflungError as error:
            log.warning("no list of relays because=%s", error)
            return
        key = self.session.client.key
        relays: dict[str, Client] = {}
        for relay in found.relays:
            try:
                relays[relay.url] = self._relays.pop(relay.url, None) or Client(relay.url, key, patience_s=0.0)
            except ConfigError as error:
                log.warning("relay left out node=%s because=%s", relay.node, error)
        await self.close()  # those that are left are gone
        self._relays = relays
