"""`farflung backup` and `restore`: a run copied while it runs, and checked where it is brought back.

The order makes the copy whole without stopping anybody. Checkpoints come first, so that none is ahead of the database;
then the database in one snapshot; blobs last, because whatever the snapshot names was stored before. Blobs deleted
meanwhile are looked for in the end, and the copy begins anew if the snapshot still needs them.
"""

import logging
import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.config import Config, load, load_run, save
from farflung.ops.invariants import violations
from farflung.protocol.digest import digest_of
from farflung.protocol.errors import ConfigError, NotFound
from farflung.protocol.identity import Key
from farflung.store import owner
from farflung.store.blobs import Blobs
from farflung.store.run import RunContext
from farflung.store.sql_connections import file_of, reading
from farflung.store.tables import SUBMISSIONS
from farflung.weights import shard_gc

log = logging.getLogger(__name__)
TRIES = 3
FOLDERS, FILES = ("checkpoints", "keys", "profiles"), ("metrics.jsonl",)
DATABASE, BLOBS = "farflung.db", "blobs"


async def back_up(config: Config, to: Path) -> str:
    """Copy a run to a folder; says what came of it. Raises ConfigError where that cannot be."""
    if (config.folder / "config.json").exists():
        config = load_run(config.folder)
    file = _database_file(config)
    if to.exists():
        raise ConfigError(f"{to} exists already; name a folder that does not, or a copy could be a mixture of two")
    for _ in range(TRIES):
        to.mkdir(parents=True)
        _copy_files(config.folder, to)
        _copy_database(file, to / DATABASE)
        copy = _at(config, to)
        count, size_bytes = await _copy_blobs(config, copy)
        save(config, to / "config.json")
        if not (missing := await _missing(copy)):
            return f"backed up run {config.run.name!r} to {to}: {count} blobs, {size_bytes:,} bytes"
        log.warning("blobs were collected while they were copied, beginning anew missing=%d", len(missing))
        shutil.rmtree(to)
    raise ConfigError(
        f"{len(missing)} blobs of run {config.run.name!r} are gone, such as {missing[0][:12]}; is its store whole?"
    )


async def restore(backup: Path, to: Path) -> str:
    """Bring a run back into the folder of runs `to`; says how to go on. Raises ConfigError if it does not hold."""
    if not (backup / "config.json").exists() or not (backup / DATABASE).exists():
        raise ConfigError(f"{backup} is no backup: `farflung backup` leaves config.json and {DATABASE} there")
    saved = load(backup / "config.json", environ={})
    folder = to / saved.run.name
    if folder.exists():
        raise ConfigError(f"{folder} exists already; move it away, or restore into another folder of runs")
    try:
        shutil.copytree(backup, folder, ignore=shutil.ignore_patterns("config.json", owner.NAME))
    except OSError:  # shutil.Error is one
        shutil.rmtree(folder, ignore_errors=True)
        raise
    config = _moved(saved, to)
    if wrong := await problems(config):
        shutil.rmtree(folder)
        raise ConfigError(f"{backup} does not hold together, nothing was restored: " + "; ".join(wrong[:5]))
    save(config, folder / "config.json")  # last: a folder that has it holds a whole run
    return f"restored to {folder}; go on with `farflung run {folder / 'config.json'} --resume`, or start its roles"


async def problems(config: Config) -> list[str]:
    """Faults of a run that no process writes to: broken invariants, and blobs that are missing or spoiled."""
    with reading(config.database_url) as connection:
        found = violations(connection, config)
    missing = [f"blob {digest[:12]} is missing" for digest in await _missing(config)]
    return [*found, *missing, *[said async for said in _spoiled(config)]]


# --- the copy --------------------------------------------------------------------------------------------------------


def _database_file(config: Config) -> Path:
    file = file_of(config.database_url)
    if file is None:
        raise ConfigError(
            "only a run on SQLite is copied here; for PostgreSQL use pg_dump and copy the blob store after it, as "
            "docs/operate.md says under Backup"
        )
    if not file.exists():
        raise ConfigError(f"there is no database {file}; was this run ever started?")
    return file


def _at(config: Config, folder: Path) -> Config:
    """The configuration of the copy in a folder, which need not be named as the run."""
    places = {"database": f"sqlite:///{(folder / DATABASE).resolve()}", "blobs": f"file://{(folder / BLOBS).resolve()}"}
    return config.model_copy(update={"coordinator": config.coordinator.model_copy(update=places)})


def _moved(config: Config, runs: Path) -> Config:
    """The configuration of a run in another folder of runs, with database and blobs of its own in there."""
    here = {"database": "", "blobs": ""}
    moved = config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": runs.resolve()}),
            "coordinator": config.coordinator.model_copy(update=here),
        }
    )
    return moved.at(runs.resolve() / config.run.name)


def _copy_files(folder: Path, to: Path) -> None:
    """Keys, checkpoints, metrics. A checkpoint that is dropped while it is copied is left out."""
    for name in FOLDERS:
        for path in sorted((folder / name).glob("*")):
            target = to / name / path.name
            target.parent.mkdir(exist_ok=True)
            try:
                shutil.copytree(path, target) if path.is_dir() else shutil.copy2(path, target)
            except (FileNotFoundError, shutil.Error) as error:
                if path.exists():
                    raise ConfigError(f"{path} cannot be copied: {error}") from error
                shutil.rmtree(target, ignore_errors=True)
    for name in FILES:
        if (folder / name).exists():
            shutil.copy2(folder / name, to / name)


def _copy_database(file: Path, to: Path) -> None:
    """One snapshot by SQLite's online backup, in which writers go on meanwhile."""
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as source, closing(sqlite3.connect(to)) as target:
        source.backup(target)
        target.execute("PRAGMA journal_mode = DELETE")


async def _copy_blobs(config: Config, copy: Config) -> tuple[int, int]:
    count = size_bytes = 0
    for source_url, target_url in ((config.blobs_url, copy.blobs_url), (config.submissions_url, copy.submissions_url)):
        source, target = Blobs(source_url), Blobs(target_url)
        async for digest, _ in source.stored():
            try:
                data = await source.get(digest)
            except NotFound:
                continue  # collected since it was listed
            await target.put(data, digest)
            count, size_bytes = count + 1, size_bytes + len(data)
    return count, size_bytes


# --- the check -------------------------------------------------------------------------------------------------------


async def _missing(config: Config) -> list[str]:
    """Digests that the database needs and the store does not have."""
    with reading(config.database_url) as connection:
        shards, bodies = _shards(connection, config), _bodies(connection)
    has_shards = {digest async for digest, _ in Blobs(config.blobs_url).stored()}
    has_bodies = {digest async for digest, _ in Blobs(config.submissions_url).stored()}
    return sorted(shards - has_shards) + sorted(bodies - has_bodies)


def _shards(connection: Connection, config: Config) -> set[str]:
    """Shards that lead to the versions in use."""
    key = Key.make()
    return shard_gc.needed(connection, RunContext(config.run.name, config, b"", key, 0, frozenset(), (), key, key))


def _bodies(connection: Connection) -> set[str]:
    return set(connection.execute(sa.select(SUBMISSIONS.c.submission)).scalars())


async def _spoiled(config: Config) -> AsyncIterator[str]:
    for url in (config.blobs_url, config.submissions_url):
        store = Blobs(url)
        async for digest, _ in store.stored():
            if digest_of(await store.get(digest)) != digest:
                yield f"blob {digest[:12]} does not have its digest"
