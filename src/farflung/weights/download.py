"""Worker, validator and relay: shards into files, from whichever source has them right; none needs to be trusted.

The bytes of a shard stay in `<shard>.part` when a source breaks off or the node restarts, and the next source
goes on from there. Only a file that comes to its digest gets the shard's name.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from farflung.net.client import Client
from farflung.net.session import Session
from farflung.protocol.digest import file_digest
from farflung.protocol.errors import (
    Busy,
    ConfigError,
    FarflungError,
    NotFound,
    Refusal,
    TooLarge,
    Unavailable,
    Unreachable,
    WeightsError,
)
from farflung.protocol.messages import Relays, Shard
from farflung.weights import ranges, sources
from farflung.weights.manifest import check_hash
from farflung.weights.url_policy import check_url

log = logging.getLogger(__name__)
PART = ".part"
AT_ONCE = 2
"""Shards on their way at a time: the next begins while the last pieces of one are still to come."""
RELAYS_EVERY_S = 10.0
RELAY_S = 5.0
RELAYS_AT_ONCE = 4
"""Relays that send pieces of one shard at the same time."""
RELAYS_TRIED = 3
"""Relays that are tried for one shard before the origin: any number of them may be dead."""
SLOWEST_BYTES_PER_S = 250_000
"""A relay that takes longer than RELAY_S and this speed allow is given up: a slow drip must not hold a node."""


class NoRoom(WeightsError):
    """This machine's disk does not take a shard; no source is to blame."""


class Downloads:
    """Fetches shards into a folder, two at a time."""

    def __init__(self, session: Session, folder: Path, *, use_relays: bool, upstream: Sequence[str] = ()) -> None:
        self.session, self.folder = session, folder
        self.scores: dict[str, sources.Score] = {}
        self._relays = {url: Client(url, session.client.key, patience_s=0.0) for url in upstream}
        self._busy: Counter[str] = Counter()
        self._pace = ranges.Pace()
        self._asked_at = 0.0 if use_relays and not upstream else float("inf")
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
                self.session.stats.fetched_bytes += shard.size_bytes
        if not lock.locked():
            self._locks.pop(shard.digest, None)

    async def _from_anyone(self, shard: Shard) -> None:
        """Several relays at once, else the first one that has it right, else the origin."""
        urls = sources.ranked(self._relays, self.scores, self._busy, time.monotonic(), self._rng)
        came_from: dict[int, str] = {}
        if shard.size_bytes > ranges.RANGE_BYTES and len(urls) > 1:
            came_from = await self._from_many(urls[:RELAYS_AT_ONCE], shard)
            if (self.folder / shard.digest).exists():
                return
            urls = [url for url in urls if url in came_from.values()]  # those that sent nothing have had their chance
        await self._from_one(urls[:RELAYS_TRIED], shard)
        self._find_liars(shard, came_from)

    async def _from_one(self, urls: Sequence[str], shard: Shard) -> None:
        """The first of these relays that has it right, else the origin."""
        for url in urls:
            self._busy[url] += 1
            try:
                if await self._from_relay(url, shard):
                    return
            finally:
                self._busy[url] -= 1
        await self._from(self.session.client, shard)

    async def _from_many(self, urls: Sequence[str], shard: Shard) -> dict[int, str]:
        """Ranges from several relays. Gives each range's relay, if they do not come to the shard."""
        part = self.folder / f"{shard.digest}{PART}"
        try:
            with part.open("ab", buffering=0) as file:
                found = ranges.Ranges(file, shard.size_bytes, partial(self._range, shard), self._pace)
                is_whole = await found.fetch(urls)
            self._mark_slow(found, shard)
            if not is_whole:
                return found.came_from
            await asyncio.to_thread(_check, part, shard)
            part.rename(self.folder / shard.digest)
        except WeightsError as error:
            log.warning("pieces do not fit shard=%s because=%s", shard.digest[:12], error)
            part.rename(self._bad(shard))
            return found.came_from
        except OSError as error:
            part.unlink(missing_ok=True)
            raise NoRoom(f"shard {shard.digest[:12]} cannot be kept here: {error.strerror}") from error
        return {}

    def _mark_slow(self, found: ranges.Ranges, shard: Shard) -> None:
        """Others outran these relays: one that sent nothing at all failed, one that sent some is a little behind."""
        for url in found.slow:
            if url in found.came_from.values():
                self.scores[url] = sources.refused(self._score(url))
            else:
                self._blame(url, shard, TimeoutError())

    async def _range(self, shard: Shard, url: str, start: int, end: int) -> Sequence[bytes] | None:
        """Bytes [start, end) of a shard from a relay, None if it fails; its score follows."""
        before = time.monotonic()
        async with self._judged(url, shard, end - start):
            data = await self._relays[url].download_range(f"/v1/blobs/{shard.digest}", start, end)
            self._praise(url, end - start, before)
            return data
        return None

    def _find_liars(self, shard: Shard, came_from: dict[int, str]) -> None:
        """The right shard is here: relays that sent pieces that differ from it lied."""
        if not self._bad(shard).exists():
            return
        with self._bad(shard).open("rb") as bad, (self.folder / shard.digest).open("rb") as good:
            liars = ranges.wrong(bad, good, came_from)
        for url in liars:
            self._blame(url, shard, WeightsError(f"pieces of shard {shard.digest[:12]} were wrong"))
        self._bad(shard).unlink()

    def _bad(self, shard: Shard) -> Path:
        return self.folder / f"{shard.digest}.bad"

    async def _from_relay(self, url: str, shard: Shard) -> bool:
        """Whether a relay had it right; its score follows."""
        before = time.monotonic()
        async with self._judged(url, shard, shard.size_bytes):
            self._praise(url, await self._from(self._relays[url], shard), before)
            return True
        return False

    @asynccontextmanager
    async def _judged(self, url: str, shard: Shard, size_bytes: int) -> AsyncIterator[None]:
        """The relay's conduct inside counts for its score: errors end here, and so does it if it is too slow."""
        try:
            async with asyncio.timeout(RELAY_S + size_bytes / SLOWEST_BYTES_PER_S):
                yield
        except NoRoom:
            raise
        except (NotFound, Unavailable, Busy) as error:
            log.info("relay passed over url=%s shard=%s because=%s", url, shard.digest[:12], error)
            self.scores[url] = sources.refused(self._score(url))
        except (Unreachable, Refusal, WeightsError, TimeoutError) as error:
            self._blame(url, shard, error)

    def _score(self, url: str) -> sources.Score:
        return self.scores.get(url, sources.Score())

    def _praise(self, url: str, size_bytes: int, since: float) -> None:
        self.scores[url] = sources.succeeded(self._score(url), size_bytes, time.monotonic() - since)

    def _blame(self, url: str, shard: Shard, error: Exception) -> None:
        why = str(error) or "too slow"
        self.session.stats.last_error = f"relay {url}: {why}"
        log.warning("relay failed url=%s shard=%s because=%s", url, shard.digest[:12], why)
        is_lie = isinstance(error, (WeightsError, TooLarge))
        self.scores[url] = sources.failed(self._score(url), time.monotonic(), is_lie=is_lie)

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
            return await self._from(source, shard)  # some of it came from another source: which lied is not known
        except OSError as error:
            part.unlink(missing_ok=True)
            raise NoRoom(f"shard {shard.digest[:12]} cannot be kept here: {error.strerror}") from error
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
                await check_url(relay.url, self.session.client.url)
                relays[relay.url] = self._relays.pop(relay.url, None) or Client(relay.url, key, patience_s=0.0)
            except ConfigError as error:
                log.warning("relay left out node=%s because=%s", relay.node, error)
        await self.close()  # those that are left are gone
        self._relays = relays


def _check(file: Path, shard: Shard) -> None:
    """Raises WeightsError unless the file is that shard."""
    check_hash(shard.digest, shard.size_bytes, file.stat().st_size, lambda: file_digest(file))
