"""The coordinator's process: everything it needs from a configuration, and the server in front of it."""

import asyncio
import gc
import logging
import sys
import time

import uvicorn
from starlette.types import ASGIApp

from farflung.config import Config, save
from farflung.coordinator import damage
from farflung.coordinator.connections import guarded
from farflung.coordinator.context import Context
from farflung.coordinator.routes import Coordinator
from farflung.dashboard import pages
from farflung.net.admin import read_token
from farflung.net.hosts import is_loopback, url_of
from farflung.net.server import listen
from farflung.protocol.errors import ConfigError
from farflung.protocol.identity import Key
from farflung.rollouts.archive import Archive
from farflung.store.blobs import Blobs
from farflung.store.db import Database, migrate
from farflung.store.metrics import Metrics
from farflung.tasks import keyring
from farflung.tasks.admit import refuse_forgotten
from farflung.tasks.create_run import (
    Model,
    create_run,
    local_grants,
    refuse_blind,
    refuse_misfit,
    seal_descriptor,
    weights_key,
)
from farflung.trust import profiles as trust_profiles
from farflung.trust.evidence import Profiles

log = logging.getLogger(__name__)
BACKLOG = 2048
"""Connections that wait to be accepted."""
SWITCH_S = 0.0005
"""How long the database's writer may keep the interpreter from the one that answers; 5 ms, Python's own, is an age."""
GARBAGE = 20_000
"""New objects after which to look for cycles among them: a set of requests makes more than Python's own 700."""


def load_profiles(config: Config) -> Profiles:
    """The numerics profiles that a run admits. Raises ConfigError for one that was made for other runs."""
    found = trust_profiles.load_profiles(config.model)
    for profile in found.every:
        refuse_misfit(config, profile)
        refuse_blind(profile)
    return found


def refuse_guessable(config: Config) -> None:
    """Raises ConfigError for a run whose secret anybody can compute, on an address that anybody can reach."""
    host = config.coordinator.host
    if config.run.reproducible and (config.coordinator.proxies or not is_loopback(host)):
        raise ConfigError(
            f"run.reproducible = true makes the secret follow from run.seed, so that every node could choose its "
            f"tokens, and {host} is open to others: set run.reproducible = false, or coordinator.host = 127.0.0.1 and "
            "no coordinator.proxies"
        )


async def open_coordinator(config: Config, *, is_first: bool = True) -> Coordinator:
    """Everything a coordinator needs, from a configuration; the run is created if it is new.

    The first process of a coordinator looks for damage, which takes a pass over the weights.
    """
    folder = config.folder
    (folder / "keys").mkdir(parents=True, exist_ok=True)
    signers = {name: Key.load_or_make(folder / "keys" / name) for name in ("coordinator", "receipts", "verdicts")}
    key = signers["coordinator"]
    publics = {name: one.public for name, one in signers.items()} | {"weights": weights_key(config)}
    ring = keyring.delegated(folder / "keys", config.run.name, publics, time.time())
    model, profiles = Model(config.model.path), load_profiles(config)
    await asyncio.to_thread(migrate, config.database_url)
    database, blobs = Database(config.database_url), Blobs(config.blobs_url)
    options = {"receipts": signers["receipts"], "verdicts": signers["verdicts"]}
    run_ctx = await create_run(config, database, model, key, time.time(), **options)
    await database.read(lambda c: refuse_forgotten(c, profiles))
    longest = max((tokens for _, tokens in run_ctx.tasks), default=0)
    descriptor = await seal_descriptor(config, blobs, model, key, ring, profiles, run_ctx.stops, longest)
    archive = Archive(Blobs(config.submissions_url), model.tokenizer, config.generate.stop)
    if is_first:
        await damage.mend(database, run_ctx, blobs, archive.blobs, time.time())
    metrics = Metrics(folder / "metrics.jsonl", time.monotonic)
    weights = ring.live(config.run.name, "weights", time.time())
    token = read_token(config.coordinator.admin_token_file)
    ctx = Context(run_ctx, descriptor, weights, profiles, archive, database, blobs, metrics, admin_token=token)
    return Coordinator(ctx)


def _server_options(config: Config, app: ASGIApp) -> uvicorn.Config:
    """How the server speaks. Raises ConfigError for a certificate that is none."""
    settings = config.coordinator
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise ConfigError("coordinator.tls_cert and coordinator.tls_key go together; one of them is missing")
    options = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=2,
        access_log=False,
        backlog=BACKLOG,
        http=guarded(settings.connections_per_address, settings.proxies),
        proxy_headers=bool(settings.proxies),
        forwarded_allow_ips=list(settings.proxies),
        ssl_certfile=settings.tls_cert or None,
        ssl_keyfile=settings.tls_key or None,
    )
    try:
        options.load()
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"coordinator.tls_cert {settings.tls_cert} and tls_key {settings.tls_key} are no certificate with its key: "
            f"{error}"
        ) from error
    return options


async def serve(config: Config) -> None:
    """Run a coordinator until it is told to stop. One of several processes on a port begins and ends no stay."""
    refuse_guessable(config)
    is_one_of_many = config.coordinator.processes > 1
    listener = listen(config.coordinator.host, config.coordinator.port, is_shared=is_one_of_many)
    config = local_grants(config)
    coordinator = await open_coordinator(config, is_first=not is_one_of_many)
    options = _server_options(config, coordinator.app())
    listener.listen(BACKLOG)  # a reader of the line below may call at once: the call waits until it is taken
    host, port = listener.getsockname()[:2]
    url = url_of(config.scheme, host, port)
    log.info("listening url=%s run=%s", url, config.run.name)
    (config.folder / "coordinator.url").write_text(f"{url}\n")
    if not (config.folder / "config.json").exists():
        save(config, config.folder / "config.json")
    is_by_hand = not is_one_of_many and coordinator.ctx.metrics.begin(time.time())
    sys.setswitchinterval(SWITCH_S)
    gc.freeze()
    gc.set_threshold(GARBAGE)
    try:
        await pages.Server(options, coordinator.leave).serve(sockets=[listener])
    finally:
        coordinator.ctx.database.close()
        if is_by_hand:
            coordinator.ctx.metrics.write("end", time.time())
