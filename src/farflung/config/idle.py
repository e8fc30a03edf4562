"""When a machine may work: what its owner prefers, out of which file, and what is strictly refused."""

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pydantic import ConfigDict, ValidationError, field_validator

from farflung.config.hours import Hours
from farflung.config.hours import parse as parse_hours
from farflung.config.section import Section, setting
from farflung.protocol.errors import ConfigError

MOST_FILE_BYTES, MOST_NAME_CHARS = 1 << 16, 200
WRITTEN = "# Written by `farflung idle set`. A key that is not here has its default; `farflung idle` shows all.\n"


class IdleSection(Section):
    model_config = ConfigDict(allow_inf_nan=False)
    when_idle: bool = setting(False, "Work only while the owner does not need the machine.")
    is_paused: bool = setting(False, "Do not work until this is false again.")
    user_idle_s: float = setting(
        180.0, "Seconds without a key or the mouse after which the owner is away; 0 to work beside a person.", ge=0
    )
    cpu_percent: float = setting(
        25.0,
        "Most of all cores that other programs of normal priority may use, in percent; 100 not to look.",
        gt=0,
        le=100,
    )
    gpu_percent: float = setting(
        25.0, "Most of a GPU that other programs may use, in percent; 100 not to look.", gt=0, le=100
    )
    busy_s: float = setting(10.0, "Seconds that they must have used more.", ge=0, is_advanced=True)
    quiet_s: float = setting(20.0, "Seconds that they must then have used less.", ge=0, is_advanced=True)
    programs: tuple[str, ...] = setting((), "Programs that need the machine for themselves, such as a game.")
    program_gone_s: float = setting(15.0, "Seconds that they must be gone.", ge=0, is_advanced=True)
    on_battery: bool = setting(False, "Work on battery too.")
    on_metered: bool = setting(False, "Work while the network is metered too.")
    hot_c: float = setting(95.0, "Degrees Celsius at which a processor or GPU is too hot; 0 not to look.", ge=0, le=150)
    cool_s: float = setting(300.0, "Seconds that it then cools down.", ge=0, is_advanced=True)
    hours: str = setting("", "Hours to work in, in local time, such as 'mon-fri 19:00-07:00, sat-sun'; empty for all.")
    share: float = setting(
        1.0, "Share of the time that it computes, from 0 to 1; it rests for the remainder.", gt=0, le=1
    )
    vacate_s: float = setting(600.0, "Seconds of suspension after which memory is given back too.", ge=0)
    ends_at: float = setting(0.0, "Unix time at which the node leaves; 0 for never.", ge=0, is_advanced=True)
    poll_s: float = setting(1.0, "Seconds between looks at the machine.", ge=0.1, le=60, is_advanced=True)

    @field_validator("hours")
    @classmethod
    def _are_hours(cls, text: str) -> str:
        parse_hours(text)
        return text

    @field_validator("programs")
    @classmethod
    def _are_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not name or not name.isprintable() or len(name) > MOST_NAME_CHARS:
                raise ValueError(f"{name!r} is no name of a program")
        return names

    @cached_property
    def open_hours(self) -> Hours:
        """The hours to work in."""
        return parse_hours(self.hours)

    @property
    def is_needed(self) -> bool:
        """Whether anything can keep the node from working."""
        return self.when_idle or self.is_paused or bool(self.hours) or self.ends_at > 0

    def over(self, other: Self) -> Self:
        """What is set here, and the other's where nothing is."""
        return type(self).model_validate(other.set_values() | self.set_values())

    def set_values(self) -> dict[str, Any]:
        """What was set, be it to the default."""
        return {name: getattr(self, name) for name in sorted(self.model_fields_set)}


def preferences_in(folder: Path) -> Path:
    """The file with the owner's preferences beside a node's key."""
    return folder / "idle.toml"


def read_preferences(path: Path) -> IdleSection:
    """What the owner prefers; the defaults where there is no such file. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            tree = tomllib.loads(file.read(MOST_FILE_BYTES).decode())
    except FileNotFoundError:
        return IdleSection()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(
            f"{path} is not valid TOML: {error}; mend it, or remove it and use `farflung idle set`"
        ) from error
    return parse(tree, f"{path}: ")


def parse(tree: Mapping[str, Any], source: str = "") -> IdleSection:
    """Settings by name. Raises ConfigError that names the key and its value."""
    try:
        return IdleSection.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{source}unknown key {where!r}; {_nearest(where)}") from error
        said = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{source}{where} = {first['input']!r}: {said}") from error


def changed(before: IdleSection, words: Sequence[str]) -> IdleSection:
    """The settings after each `key=value`, one without a value being the default again. Raises ConfigError."""
    tree = before.set_values()
    for word in words:
        key, joined, text = word.partition("=")
        if not joined:
            raise ConfigError(f"{word!r} is no setting; write key=value, such as user_idle_s=300")
        if key not in IdleSection.model_fields:
            raise ConfigError(f"unknown key {key!r}; {_nearest(key)}")
        tree.pop(key, None)
        if text:
            tree[key] = _value(key, text)
    return parse(tree)


def _value(key: str, text: str) -> Any:
    if key == "programs" and not text.startswith("["):
        return [name.strip() for name in text.split(",")]
    if IdleSection.model_fields[key].annotation is str:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def write_preferences(path: Path, settings: IdleSection) -> None:
    """Keep what is set, whole or not at all. JSON writes these values as TOML does."""
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in settings.set_values().items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(WRITTEN + "".join(lines), encoding="utf-8")
    draft.replace(path)


def _nearest(key: str) -> str:
    close = difflib.get_close_matches(key, IdleSection.model_fields, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(IdleSection.model_fields)}"
