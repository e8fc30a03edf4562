"""Settings out of a file, the environment and flags, and the resolved ones into a file."""

import difflib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from farflung.config import renamed
from farflung.config.tree import Config, fields
from farflung.protocol.errors import ConfigError

PREFIX = "FARFLUNG_"
SAVED = "config.json"
"""The resolved configuration in a run's folder."""
OF_A_RUN = ("keys", "farflung.db", "checkpoints")
"""A folder with any of these beside its config.json is the folder of a run."""


def load(path: Path | None, flags: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> Config:
    """Read a configuration. Raises ConfigError with one sentence for whatever is wrong.

    The config.json in a run's folder means the run in that folder, unless a flag or variable names another.
    """
    tree = _read(path) if path else {}
    own = _run_of(tree)
    for key, value in environ.items():
        if key.startswith(PREFIX) and "__" in key:
            _set(tree, key.removeprefix(PREFIX).lower().split("__"), value)
    for dotted, value in _flags(flags):
        _set(tree, dotted.split("."), value)
    config = _anchor(_parse(tree, path), path.parent if path else Path())
    if path and path.name == SAVED and own == _run_of(tree) and any((path.parent / name).exists() for name in OF_A_RUN):
        return config.at(path.parent)
    return config


def load_run(folder: Path) -> Config:
    """The configuration of the run in a folder, as it was saved there. Raises ConfigError."""
    if not (folder / SAVED).exists():
        raise ConfigError(f"{folder} holds no run: {SAVED} is missing")
    return load(folder / SAVED, environ={}).at(folder)


def save(config: Config, path: Path) -> None:
    """Write the resolved configuration beside the run, whole or not at all."""
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    draft.replace(path)


def _run_of(tree: dict[str, Any]) -> tuple[Any, Any]:
    run = tree.get("run")
    return (run.get("dir"), run.get("name")) if isinstance(run, dict) else (None, None)


def _read(path: Path) -> dict[str, Any]:
    """A file as a tree, whatever the locale; the mark that some editors put first is passed over."""
    kind = path.suffix[1:].upper() or "TOML"
    try:
        text = path.read_bytes().decode("utf-8-sig")
        tree = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not text in UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start}); save it as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid {kind}: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; write one object with a section per role")
    return tree


def _flags(flags: Sequence[str]) -> Iterator[tuple[str, str]]:
    rest = list(flags)
    while rest:
        name, joined, value = rest.pop(0).partition("=")
        if not name.startswith("--") or "." not in name:
            raise ConfigError(f"{name!r} is no setting; write --section.key value, for example --run.seed 3")
        if not joined:
            if not rest:
                raise ConfigError(f"{name} has no value; write {name} VALUE")
            value = rest.pop(0)
        yield name[2:].replace("-", "_"), value


def _set(tree: dict[str, Any], keys: Sequence[str], text: str) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{'.'.join(keys)}: {key} is a value, not a section")
    try:
        tree[keys[-1]] = json.loads(text)
    except (ValueError, RecursionError):
        tree[keys[-1]] = text


def _parse(tree: dict[str, Any], path: Path | None) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        source = f"{path}: " if path else ""
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{source}unknown key {where!r}; {_nearest(where)}") from error
        raise ConfigError(f"{source}{where} = {first['input']!r}: {first['msg']}") from error


def _nearest(where: str) -> str:
    if where in renamed.SETTINGS:
        return f"it is called {renamed.SETTINGS[where]!r}"
    close = difflib.get_close_matches(where, [name for name, _ in fields()], n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "docs/config.md lists all keys"


def _anchor(config: Config, base: Path) -> Config:
    """Paths in a file are relative to that file."""
    model, env = config.model, config.env
    if model.path and (base / model.path).exists():
        model = model.model_copy(update={"path": str((base / model.path).resolve())})
    name, colon, attribute = env.name.partition(":")
    if name.endswith((".py", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")) and (base / name).exists():
        env = env.model_copy(update={"name": str((base / name).resolve()) + colon + attribute})
    if env.keep and (base / env.keep).exists():
        env = env.model_copy(update={"keep": str((base / env.keep).resolve())})
    return config.model_copy(update={"model": model, "env": env})
