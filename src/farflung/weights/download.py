"""Worker, validator and relay: shards into files, from whichever source has them right; none needs to be trusted.

What has come of a shard stays in `<shard>.part` when a source breaks off or the node restarts, and the next source
goes on from there. Only a file that comes to its digest gets the shard's name.
"""

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import Sequence
from pathlib import Path

from farflung.protocol.client import Client
from farflung.protocol.errors import ConfigError, FarflungError, Refusal, TooLarge, Unreachable, WeightsError
from farflung.protocol.messages import Relays, Shard
from farflung.protocol.session import Session
from farflung.weights import sources

log = logging.getLogger(__name__)
PART = ".part"
AT_ONCE = 4
RELAYS_EVERY_S = 10.0
RELAY_S = 5.0
RELAYS_TRIED = 3
"""Relays that are tried for one shard before the origin: any number of them may be dead."""
SLOWEST_BYTES_PER_S = 250_000
"""A relay that takes longer than RELAY_S and this speed allow is given up: a slow drip must not hold a node."""


class Downloads:
    """Fetches shards into a folder, four at a time."""

    def __init__(self, session: Session, folder: Path, *, use_relays: bool) -> None:
        self.session, self.folder = session, folder
        self.scores: dict[str, sources.Score] = {}
        self._relays: dict[str, Client] = {}
        self._asked_at = 0.0 if use_relays else float("inf")
        self._rng = random.Random(session.client.key.id)
        self._limit = asyncio.Semaphore(AT_ONCE)
        self._locks: dict[str, asyncio.Lock] = {}

    async def fetch(self, shards: Sequence[Shard]) -> None:
        """Have all these shards in the folder. Raises WeightsError, NotFound, Unreachable."""
        await self._learn_relays()
        await asyncio.gather(*(self._one(shard) for shard in {shard.digest: shard for shard in shards}.values()))

    async def close(self) -> None:
        """Hang up on all relays."""
        for relay in self._relays.values():
            await relay.close()

    async def _one(self, shard: Shard) -> None:
        lock = self._locks.setdefault(shard.digest, asyncio.Lock())
        async with self._limit, lock:
            if not (self.folder / shard.digest).exists():
                await self._from_anyone(shard)
        if not lock.locked():
            self._locks.pop(shard.digest, None)

    async def _from_anyone(self, shard: Shard) -> None:
        """The first relay that has it right, else the origin."""
        for url in sources.order(self._relays, self.scores, self._rng)[:RELAYS_TRIED]:
            before, score = time.monotonic(), self.scores.get(url, sources.Score())
            try:
                async with asyncio.timeout(RELAY_S + shard.size_bytes / SLOWEST_BYTES_PER_S):
                    size_bytes = await self._from(self._relays[url], shard)
            except (Unreachable, Refusal, WeightsError, TimeoutError) as error:
                log.warning("relay failed url=%s shard=%s because=%s", url, shard.digest[:12], error or "too slow")
                self.scores[url] = sources.failed(score)
                continue
            self.scores[url] = sources.succeeded(score, size_bytes, time.monotonic() - before)
            return
        await self._from(self.session.client, shard)

    async def _from(self, source: Client, shard: Shard) -> int:
        """Fetch what is missing from one source; gives how many bytes that were."""
        part = self.folder / f"{shard.digest}{PART}"
        before = part.stat().st_size if part.exists() else 0
        try:
            if before < shard.size_bytes:
                with part.open("ab", buffering=0) as file:
                    await source.download_into(f"/v1/blobs/{shard.digest}", file, limit_bytes=shard.size_bytes)
            await asyncio.to_thread(_check, part, shard)
        except (WeightsError, TooLarge):
            part.unlink(missing_ok=True)
            if not before:
                raise
            return await self._from(source, shard)  # some of it came from another source: who lied is not known
        except OSError as error:
            part.unlink(missing_ok=True)
            raise WeightsError(f"shard {shard.digest[:12]} cannot be kept here: {error.strerror}") from error
        part.rename(self.folder / shard.digest)
        return shard.size_bytes - before

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


def _check(file: Path, shard: Shard) -> None:
    """Raises WeightsError unless the file is that shard."""
    size = file.stat().st_size
    if size != shard.size_bytes:
        raise WeightsError(f"shard {shard.digest[:12]} has {size} bytes, its manifest says {shard.size_bytes}")
    with file.open("rb") as data:
        found = hashlib.file_digest(data, "sha256").hexdigest()
    if found != shard.digest:
        raise WeightsError(f"shard {shard.digest[:12]} hashes to {found[:12]}; fetch it from somebody else")
