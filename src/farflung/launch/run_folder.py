"""The folder of an embedded run: made, emptied or gone on with; one that is taken, or no run's, is refused.

A folder is free while no run was founded in it: an empty one, or what a start left that came to nothing.
"""

import os
import sys
from pathlib import Path

from farflung.config import SAVED, Config, load
from farflung.coordinator.process import refuse_guessable
from farflung.protocol.errors import ConfigError
from farflung.store import owner
from farflung.store.run import holds_run
from farflung.store.sql_connections import shown
from farflung.tasks.create_run import founded_in, refuse_another
from farflung.tasks.model import Model
from farflung.tasks.model_check import refuse_long, refuse_unfit

LEFT_BY_A_START = {owner.NAME, "keys", "logs", "nodes", "profiles", "blobs", "checkpoints", "metrics.jsonl", SAVED}
"""Files that may be there before a run is founded."""
LOW_BYTES = 64 << 20
"""Less room than this on its disk is a run's last."""


def prepare(config: Config, *, resume: bool = False, fresh: bool = False) -> None:
    """Make the run's folder this process's own, or find it for `--resume`. Raises ConfigError, and nothing is lost."""
    folder = config.folder
    refuse_guessable(config)
    if not config.model.path:
        raise ConfigError("model.path is missing; name a folder of a Hugging Face causal LM or its hub id")
    if resume and not (folder / SAVED).exists():
        raise ConfigError(f"{folder} holds no run to resume; start it without --resume")
    if not resume:
        model = Model(config.model.path)
        refuse_unfit(model, lambda text: sys.stderr.write(f"farflung: {text}\n"))
        refuse_long(model, [1], config.generate.max_new_tokens)  # no prompt is shorter
    _make(folder)
    owner.own(folder)
    if resume:
        refuse_another(founded_in(folder), config)
        _refuse_unfounded(config)
    else:
        _refuse_held(config)
        _empty(folder) if fresh and _may_be_emptied(config) else _refuse_founded(config)
    (folder / "keys").mkdir(parents=True, exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)


def why_disk_full(folder: Path) -> str:
    """A sentence when the folder's disk is full or nearly so, else nothing."""
    try:
        found = os.statvfs(folder)
    except (OSError, AttributeError):
        return ""
    left = found.f_bavail * found.f_frsize
    if found.f_files and not found.f_favail:
        return f"the disk of {folder} can hold no more files; make room"
    if left < LOW_BYTES:
        return f"{left / 1e6:.0f} MB are left on the disk of {folder}; make room, nothing can be written without"
    return ""


def _make(folder: Path) -> None:
    if folder.is_symlink() and not folder.exists():
        raise ConfigError(f"{folder} is a link to {os.readlink(folder)}, which does not exist; make that or remove it")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; move it away, or name another run by --run.name")
    folder.mkdir(parents=True, exist_ok=True)


def _refuse_unfounded(config: Config) -> None:
    if not holds_run(config.database_url, config.run.name):
        _refuse_lone_checkpoints(config)
        raise ConfigError(f"{config.folder} holds no run to resume: none was founded; start it without --resume")


def _refuse_held(config: Config) -> None:
    """A database of its own is not emptied with the folder."""
    if config.coordinator.database and holds_run(config.database_url, config.run.name):
        raise ConfigError(
            f"database {shown(config.database_url)} holds run {config.run.name!r} already; name another run or "
            "database, or use --resume"
        )


def _refuse_founded(config: Config) -> None:
    folder = config.folder
    if not config.coordinator.database and holds_run(config.database_url, config.run.name):
        raise ConfigError(f"{folder} exists already; use --resume to go on, --fresh to throw it away")
    _refuse_lone_checkpoints(config)
    (folder / "metrics.jsonl").unlink(missing_ok=True)  # figures of a start that came to nothing


def _refuse_lone_checkpoints(config: Config) -> None:
    """Checkpoints without the database that they belong to are worth more than a run that begins beside them."""
    folder = config.folder
    if any((folder / "checkpoints").glob("step-*")):
        raise ConfigError(
            f"{folder} holds checkpoints, but {shown(config.database_url)} knows no run {config.run.name!r}; bring a "
            "backup back with `farflung restore`, or use --fresh to throw them away"
        )


def _may_be_emptied(config: Config) -> bool:
    """Raises ConfigError for a folder that holds no run, but something else."""
    folder = config.folder
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in LEFT_BY_A_START)
    if foreign and not (folder / "farflung.db").exists() and not _is_ours(folder / SAVED):
        raise ConfigError(
            f"{folder} holds no run, but {foreign[0]}, which --fresh would delete; move it away or name another run"
        )
    return True


def _is_ours(path: Path) -> bool:
    try:
        load(path, environ={})
    except ConfigError:
        return False
    return True


def _empty(folder: Path) -> None:
    """Delete what is in a folder, but neither the folder, which may be a link or a mount, nor its owner's lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            _empty(path)
            if not path.is_mount():
                path.rmdir()
        elif path.name != owner.NAME:
            path.unlink()
