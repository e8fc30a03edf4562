"""Relay: mirrors shards from upstream, serves byte ranges. Untrusted; anyone can add one. No torch."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from farflung.config import RelaySection
from farflung.net.client import Client
from farflung.net.hosts import url_of
from farflung.net.metrics_server import exposition
from farflung.net.server import listen
from farflung.net.session import Session, stop_on_signals
from farflung.protocol.identity import Key
from farflung.weights.cache import Versions
from farflung.weights.mirror import Mirror

log = logging.getLogger(__name__)
KEEP_ALIVE_S = 60
"""Longer than nodes keep an idle line, so that none asks over one that is just being hung up."""


class Relay:
    """One relay. `public_url` is where nodes reach it; by default where it listens."""

    def __init__(
        self,
        url: str,
        key: Key,
        folder: Path,
        settings: RelaySection,
        *,
        run: str = "",
        root: bytes | None = None,
        name: str = "",
    ) -> None:
        self.client, self.folder, self.settings, self.name = Client(url, key), folder, settings, name
        self._run, self._root = run, root
        self.session: Session
        self.mirror: Mirror
        self._server: uvicorn.Server | None = None

    async def run(self) -> None:
        """Mirror and serve until the run ends or the relay is told to stop."""
        with listen(self.settings.host, self.settings.port) as listener:
            port = listener.getsockname()[1]
            url = self.settings.public_url or url_of("http", self.settings.host, port)
            self.session = await Session.open(
                self.client, "relay", run=self._run, root=self._root, name=self.name, url=url
            )
            self.mirror = Mirror(
                Versions(
                    self.session,
                    self.folder / "weights",
                    keep=self.settings.keep_versions,
                    limit_bytes=int(self.settings.disk_gb * 1e9),
                    use_relays=False,
                    upstream=self.settings.upstream,
                ),
                per_client=self.settings.per_client,
                at_once=self.settings.at_once,
            )
            log.info("relaying url=%s run=%s", url, self.session.run)
            options = uvicorn.Config(
                self.app(),
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=2,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
            self._server = uvicorn.Server(options)
            await self._server.serve(sockets=[listener])
        await self.session.say_goodbye()
        await self.client.close()

    def stop(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.should_exit = True

    def app(self) -> Starlette:
        """The HTTP application: shards, and a word on how it does."""

        @contextlib.asynccontextmanager
        async def life(_: Starlette) -> AsyncIterator[None]:
            stop_on_signals(self.stop)
            tasks = [asyncio.create_task(self.session.keep_heartbeats()), asyncio.create_task(self._follow())]
            yield
            for task in tasks:
                task.cancel()

        routes = [
            Route("/v1/blobs/{digest}", self.mirror.blob),
            Route("/", self.about),
            Route("/metrics", self.metrics),
        ]
        return Starlette(routes=routes, lifespan=life)

    async def about(self, request: Request) -> Response:
        """The version that this relay mirrors."""
        figures = self.session.stats
        return JSONResponse(
            {"run": self.session.run, "step": figures.loaded_step, "sent_bytes": self.mirror.sent_bytes}
        )

    async def metrics(self, request: Request) -> Response:
        """The same for Prometheus."""
        return Response(exposition(self.session, "relay"), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _follow(self) -> None:
        while not self.session.is_over:
            self.session.stats.phase = "mirroring"
            await self.mirror.follow(self.session.latest.manifest)
            self.session.stats.phase = "serving"
            await asyncio.sleep(self.settings.poll_s)
            await self.session.refresh()
        self.stop()
