"""From the words in a config to an environment: `sums`, `reasoning_gym:NAME`, `file.py:Class`, `data.jsonl`."""

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from farflung.envs import data_file
from farflung.envs.base import Env
from farflung.envs.jsonl import Jsonl
from farflung.envs.reasoning_gym import ReasoningGym
from farflung.envs.sums import Sums
from farflung.protocol.errors import ConfigError

BUILT_IN: dict[str, Callable[..., Env]] = {"sums": Sums, "reasoning_gym": ReasoningGym}
MEMBERS = ("tasks", "prompt", "score", "version", "spec")


def load_env(spec: str, args: dict[str, Any] | None = None) -> Env:
    """Make the environment that `spec` names with its keyword arguments; ConfigError says what to change."""
    path, _, name = spec.rpartition(":")
    if path.endswith(".py"):
        return check_members(construct(class_in(path, name), dict(args or {}), spec), spec)
    if spec.lower().endswith(data_file.SUFFIXES):
        return construct(Jsonl, {"path": spec, **(args or {})}, spec)
    kind, colon, task = spec.partition(":")
    if kind not in BUILT_IN or (colon and kind != "reasoning_gym"):
        raise ConfigError(unknown(spec))
    return construct(BUILT_IN[kind], {**({"name": task} if colon else {}), **(args or {})}, spec)


def unknown(spec: str) -> str:
    """The message for a spec of no known form."""
    if spec.endswith(".py"):
        return f"the environment {spec!r} names no class; write {spec}:Env"
    if spec.lower().endswith((".parquet", ".arrow", ".gz", ".zip", ".xlsx", ".txt")):
        return f"the environment {spec!r} is no file of questions that can be read; save it as .jsonl, .json or .csv"
    nearest = get_close_matches(spec.partition(":")[0], BUILT_IN, n=1)
    hint = (
        f"did you mean {nearest[0]!r}?"
        if nearest
        else "choose sums, reasoning_gym:NAME, FILE.py:CLASS or a .jsonl, .json or .csv"
    )
    return f"there is no environment {spec!r}; {hint}"


def construct(cls: Callable[..., Env], args: dict[str, Any], spec: str) -> Env:
    """Call the constructor; whatever a user's one raises becomes a ConfigError with its reason."""
    try:
        inspect.signature(cls).bind(**args)
    except TypeError as error:
        known = ", ".join(inspect.signature(cls).parameters) or "none"
        raise ConfigError(f"environment {spec!r}: {error}; its arguments are: {known}") from error
    try:
        return cls(**args)
    except ConfigError:
        raise
    except Exception as error:  # code of the user's: whatever it raises is a fault of the config
        raise ConfigError(f"environment {spec!r} cannot be made: {type(error).__name__}: {error}") from error


def class_in(path: str, name: str) -> Callable[..., Env]:
    """The class of that name in a Python file."""
    module = run_file(path)
    if not inspect.isclass(getattr(module, name, None)):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        nearest = get_close_matches(name, classes, n=1, cutoff=0) or ["none"]
        raise ConfigError(f"{path} has no class {name!r}; the nearest it has is {nearest[0]!r}")
    return getattr(module, name)


def run_file(path: str) -> ModuleType:
    """Import a Python file under a name of its own, so that two files called env.py do not meet."""
    file = Path(path).resolve()
    if not file.is_file():
        raise ConfigError(f"there is no file {path} in {Path.cwd()}; check the path of the environment")
    module_name = f"farflung_env_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    found = importlib.util.spec_from_file_location(module_name, file)
    if found is None or found.loader is None:
        raise ConfigError(f"{path} cannot be imported; give a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[module_name] = module
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise ConfigError(f"{path} does not import: {type(error).__name__}: {error}") from error
    return module


def check_members(env: Env, spec: str) -> Env:
    """The env if it has all five members."""
    missing = [member for member in MEMBERS if not hasattr(env, member)]
    if missing:
        raise ConfigError(f"environment {spec!r} lacks {', '.join(missing)}; an environment has {', '.join(MEMBERS)}")
    return env
