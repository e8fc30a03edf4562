"""Relay: follow the run's latest version, and serve its shards, by range too, as soon as each is here."""

import asyncio
import logging
import re

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from farflung.protocol.errors import FarflungError, NotFound, Unavailable
from farflung.protocol.server import problem_response
from farflung.weights.cache import Versions

log = logging.getLogger(__name__)
PATIENCE_S = 20.0
POLL_S = 0.05


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
        path = self.versions.path(digest)
        self.sent_bytes += path.stat().st_size
        return FileResponse(path, media_type="application/octet-stream", headers={"etag": f'"{digest}"'})

    async def _await(self, digest: str) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise NotFound(f"{digest[:64]!r} is no SHA-256 in hex")
        for _ in range(int(PATIENCE_S / POLL_S)):
            if self.versions.is_wanted(digest) and self.versions.path(digest).exists():
                return
            if not self.versions.is_wanted(digest) and not self._is_behind():
                raise NotFound(f"no version that this relay mirrors has a shard {digest[:12]}")
            await asyncio.sleep(POLL_S)
        raise Unavailable(f"shard {digest[:12]} is still on its way here; ask another source", retry_after_s=1)

    def _is_behind(self) -> bool:
        """Whether a version is known that is not mirrored yet."""
        return self.versions.session.latest.manifest not in ("", self.followed)
