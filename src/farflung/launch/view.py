"""`farflung view`: the dashboard over a run that is over, read only."""

import asyncio
import logging
from pathlib import Path

import sqlalchemy as sa
import uvicorn
from sqlalchemy import Connection
from starlette.applications import Starlette

from farflung.config import Config, load_run
from farflung.dashboard import pages
from farflung.net.hosts import KnownHosts, url_of
from farflung.net.server import listen
from farflung.protocol.errors import ConfigError
from farflung.rollouts.archive import Archive
from farflung.store.blobs import Blobs
from farflung.store.db import Database
from farflung.store.sql_connections import readable, reading
from farflung.store.tables import EVENTS, NODES, RUNS
from farflung.tasks.create_run import Model

log = logging.getLogger(__name__)


def run_in(folder: Path) -> Config:
    """The configuration of the run in a folder, wherever that folder is by now. Raises ConfigError."""
    config = load_run(folder)
    coordinator = config.coordinator.model_copy(update={"redact": False})  # a reader of the folder may see all of it
    return config.model_copy(update={"coordinator": coordinator})


def desk_of(config: Config) -> pages.Desk:
    """The sources of the pages, at the moment the run was last heard of."""
    with reading(config.database_url) as connection:
        end = _end(connection, config.run.name)
    database = Database(readable(config.database_url))
    return pages.Desk(config, database, _archive(config), config.folder / "metrics.jsonl", lambda: end, is_live=False)


def _end(connection: Connection, run: str) -> float:
    if connection.execute(sa.select(RUNS.c.run).where(RUNS.c.run == run)).first() is None:
        raise ConfigError(f"the database of run {run!r} does not know it; was it ever started?")
    last = [connection.execute(sa.select(sa.func.max(column))).scalar() for column in (NODES.c.seen_at, EVENTS.c.at)]
    return max((at for at in last if at is not None), default=0.0)


def _archive(config: Config) -> Archive | None:
    """The transcripts, if the model's tokenizer is still where it was."""
    try:
        return Archive(Blobs(config.submissions_url), Model(config.model.path).tokenizer, config.generate.stop)
    except ConfigError as error:
        log.warning("no transcripts reason=%s", error)
        return None


def app_of(desk: pages.Desk) -> tuple[Starlette, pages.Pages]:
    """The pages alone: no route of the protocol, nothing that writes."""
    app = Starlette()
    return app, pages.mount(app, desk)


def view(folder: Path, host: str, port: int) -> None:
    """Serve the pages until the process is told to stop."""
    desk = desk_of(run_in(folder))
    with listen(host, port) as listener:
        address, port = listener.getsockname()[:2]
        print(f"farflung: {folder} is at {url_of('http', address, port)}, read only; Ctrl-C ends it", flush=True)
        app, shown = app_of(desk)
        options = uvicorn.Config(
            KnownHosts(app, (host,)), log_level="warning", timeout_graceful_shutdown=1, access_log=False
        )
        try:
            asyncio.run(pages.Server(options, shown.live.stop).serve(sockets=[listener]))
        finally:
            desk.database.close()
