"""Relay: follow the run's latest version, and serve its shards, by range too, while they are still coming in.

What is passed on in flight is not checked yet: whoever fetches it checks it, and no wrong file here has a shard's name.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from typing import BinaryIO

from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse

from farflung.protocol.errors import FarflungError, NotFound, OutOfRange, Unavailable
from farflung.protocol.server import problem_response
from farflung.weights.cache import Versions
from farflung.weights.origin import PIECE_BYTES, byte_range

log = logging.getLogger(__name__)
PATIENCE_S = 20.0
POLL_S = 0.02


class Mirror:
    """What a relay holds. It serves only shards that a sealed manifest of its run names."""

    def __init__(self, versions: Versions) -> None:
        self.versions = versions
        self.sent_bytes = 0
        self.followed = ""

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
        self.versions.session.figures.loaded_step = manifest.step
        log.info("mirrored step=%d shards=%d", manifest.step, len(manifest.shards))

    async def blob(self, request: Request) -> Response:
        """GET /v1/blobs/{digest}: a shard, waiting a little for one that is on its way."""
        digest = request.path_params["digest"]
        try:
            await self._await(digest)
        except (NotFound, Unavailable) as refusal:
            return problem_response(refusal)
        path, headers = self.versions.path(digest), {"etag": f'"{digest}"'}
        if not path.exists():
            return self._in_flight(request, digest, headers)
        self.sent_bytes += path.stat().st_size
        return FileResponse(path, media_type="application/octet-stream", headers=headers)

    def _in_flight(self, request: Request, digest: str, headers: dict[str, str]) -> Response:
        """A shard, or a range of it, as it arrives."""
        size = self.versions.size_bytes(digest)
        try:
            start, end = byte_range(request.headers.get("range", ""), size)
        except OutOfRange as refusal:
            return problem_response(refusal)
        is_whole = (start, end) == (0, size)
        headers |= {"content-length": str(end - start), "accept-ranges": "bytes"}
        headers |= {} if is_whole else {"content-range": f"bytes {start}-{end - 1}/{size}"}
        body = self._arriving(digest, start, end)
        return StreamingResponse(body, 200 if is_whole else 206, headers, media_type="application/octet-stream")

    async def _arriving(self, digest: str, start: int, end: int) -> AsyncIterator[bytes]:
        """Bytes [start, end) of a file that grows; breaks off when it has not grown for a while."""
        with self._open(digest) as file:  # renamed when whole, it stays the same file
            file.seek(start)
            stalled = 0
            while start < end:
                data = file.read(min(PIECE_BYTES, end - start))
                stalled = 0 if data else stalled + 1
                if stalled > PATIENCE_S / POLL_S:
                    raise Unavailable(f"shard {digest[:12]} stopped coming in")
                start, self.sent_bytes = start + len(data), self.sent_bytes + len(data)
                if data:
                    yield data
                else:
                    await asyncio.sleep(POLL_S)

    def _open(self, digest: str) -> BinaryIO:
        try:
            return self.versions.partial(digest).open("rb")
        except FileNotFoundError:  # it is whole by now
            return self.versions.path(digest).open("rb")

    async def _await(self, digest: str) -> None:
        """Wait until a shard is here or coming in. Raises NotFound, Unavailable."""
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise NotFound(f"{digest[:64]!r} is no SHA-256 in hex")
        for _ in range(int(PATIENCE_S / POLL_S)):
            places = (self.versions.path(digest), self.versions.partial(digest))
            if self.versions.is_wanted(digest) and any(place.exists() for place in places):
                return
            if not self.versions.is_wanted(digest) and not self._is_behind():
                raise NotFound(f"no version that this relay mirrors has a shard {digest[:12]}")
            await asyncio.sleep(POLL_S)
        raise Unavailable(f"shard {digest[:12]} is still on its way here; ask another source", retry_after_s=1)

    def _is_behind(self) -> bool:
        """Whether a version is known that is not mirrored yet."""
        return self.versions.session.latest.manifest not in ("", self.followed)
