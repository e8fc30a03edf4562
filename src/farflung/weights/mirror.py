"""Relay: follow the run's latest version, and serve its shards, by range too, while they are still coming in.

Bytes that are passed on in flight are not checked yet: the node that fetches them checks them, and no wrong file here
has a shard's name.
"""

import asyncio
import logging
import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, BinaryIO

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from farflung.net.server import problem_response
from farflung.protocol.errors import Busy, FarflungError, NotFound, OutOfRange, Unavailable
from farflung.weights.cache import Versions
from farflung.weights.origin import RANGE_BYTES, byte_range

log = logging.getLogger(__name__)
PATIENCE_S = 20.0
POLL_S, GROW_S = 0.02, 0.1
"""How often to look whether a shard is here, and for more of one that is coming in: rarely, each look costs CPU."""
NEWS_S = 1.0
"""How long a shard that nothing is known of may still turn out to belong to a version just published."""


class Mirror:
    """The shards that a relay holds. It serves only shards that a sealed manifest of its run names.

    `per_client` and `at_once` bound how many answers one address, and all of them together, are sent at a time.
    """

    def __init__(self, versions: Versions, *, per_client: int = 16, at_once: int = 256) -> None:
        self.versions, self.per_client, self.at_once = versions, per_client, at_once
        self.sent_bytes = 0
        self.followed = ""
        self._sending: Counter[str] = Counter()

    async def follow(self, digest: str) -> None:
        """Mirror one version, unless it is here."""
        if not digest or digest == self.followed:
            return
        try:
            manifest = await self.versions.fetch(digest)
        except FarflungError as error:
            log.warning("mirroring failed manifest=%s because=%s", digest[:12], error)
            return
        self.followed = digest
        self.versions.session.stats.loaded_step = manifest.step
        log.info("mirrored step=%d shards=%d", manifest.step, len(manifest.shards))

    async def blob(self, request: Request) -> Response:
        """GET /v1/blobs/{digest}: a shard or a range of it, as it arrives if it is still coming in."""
        who = request.client.host if request.client else ""
        try:
            self._refuse_greedy(who)
            async with _Place(self._sending, who):
                await self._await(request.path_params["digest"])
            return self._answer(request, who)
        except (NotFound, Unavailable, Busy, OutOfRange) as refusal:
            return problem_response(refusal)

    def _refuse_greedy(self, who: str) -> None:
        """Raises Busy for an address that is sent enough already, or when all are."""
        if self._sending[who] >= self.per_client or self._sending.total() >= self.at_once:
            raise Busy(
                f"this relay sends {self._sending[who]} shards to you and {self._sending.total()} in all; "
                f"{self.per_client} and {self.at_once} are its limits, ask another source",
                retry_after_s=1,
            )

    def _answer(self, request: Request, who: str) -> Response:
        digest = request.path_params["digest"]
        size = self.versions.size_bytes(digest)
        start, end = byte_range(request.headers.get("range", ""), size)
        is_whole = (start, end) == (0, size)
        headers = {"etag": f'"{digest}"', "content-length": str(end - start), "accept-ranges": "bytes"}
        headers |= {} if is_whole else {"content-range": f"bytes {start}-{end - 1}/{size}"}
        body = self._arriving(digest, start, end)
        return _Counted(body, 200 if is_whole else 206, headers, place=_Place(self._sending, who))

    async def _arriving(self, digest: str, start: int, end: int) -> AsyncIterator[bytes]:
        """Bytes [start, end) of a file that may still grow; breaks off when it has not grown for a while."""
        with self._open(digest) as file:  # renamed when whole, it stays the same file
            file.seek(start)
            size, grown_at = 0, time.monotonic()
            while start < end:
                if data := file.read(min(RANGE_BYTES, end - start)):
                    start, self.sent_bytes = start + len(data), self.sent_bytes + len(data)
                    yield data
                    continue
                if size < (size := os.fstat(file.fileno()).st_size):
                    grown_at = time.monotonic()
                if time.monotonic() > grown_at + PATIENCE_S:
                    raise Unavailable(f"shard {digest[:12]} stopped coming in")
                await asyncio.sleep(GROW_S)

    def _open(self, digest: str) -> BinaryIO:
        try:
            return self.versions.partial(digest).open("rb")
        except FileNotFoundError:  # it is whole
            return self.versions.path(digest).open("rb")

    async def _await(self, digest: str) -> None:
        """Wait until a shard is here or coming in. Raises NotFound, Unavailable."""
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise NotFound(f"{digest[:64]!r} is no digest in hex")
        for tried in range(int(PATIENCE_S / POLL_S)):
            places = (self.versions.path(digest), self.versions.partial(digest))
            is_wanted = self.versions.is_wanted(digest)
            if is_wanted and any(place.exists() for place in places):
                return
            if not is_wanted and not self._is_behind() and tried > NEWS_S / POLL_S:
                raise NotFound(f"no version that this relay mirrors has a shard {digest[:12]}")
            await asyncio.sleep(POLL_S)
        raise Unavailable(f"shard {digest[:12]} is still on its way here; ask another source", retry_after_s=1)

    def _is_behind(self) -> bool:
        """Whether a version is known that is not mirrored yet."""
        return self.versions.session.latest.manifest not in ("", self.followed)


class _Place:
    """One of the answers that an address may be sent at a time."""

    def __init__(self, sending: Counter[str], who: str) -> None:
        self._sending, self._who = sending, who

    async def __aenter__(self) -> None:
        self._sending[self._who] += 1

    async def __aexit__(self, *_: object) -> None:
        self._sending[self._who] -= 1
        if not self._sending[self._who]:
            del self._sending[self._who]


class _Counted(StreamingResponse):
    """A body that takes a place for as long as it is sent."""

    def __init__(self, body: AsyncIterator[bytes], status: int, headers: dict[str, str], *, place: _Place) -> None:
        super().__init__(body, status, headers, media_type="application/octet-stream")
        self._place = place

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with self._place:
            await super().__call__(scope, receive, send)
