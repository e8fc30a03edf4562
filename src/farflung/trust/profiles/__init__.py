"""The numerics profiles that come with the package, one JSON file each, made by `farflung calibrate`."""

from importlib import resources
from pathlib import Path

import msgspec

from farflung.config import ModelSection
from farflung.protocol.errors import ConfigError
from farflung.trust.evidence import Profile, Profiles, from_json


def names() -> list[str]:
    """Every profile that comes with the package."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def load_profile(name: str) -> Profile:
    """A profile by name, or from a JSON file that `farflung calibrate` wrote. Raises ConfigError."""
    if name.endswith(".json"):
        return _from_file(Path(name))
    if name not in names():
        raise ConfigError(
            f"there is no numerics profile {name!r}; known are {', '.join(names())}, "
            "or name a file that `farflung calibrate` wrote"
        )
    return from_json(resources.files(__name__).joinpath(f"{name}.json").read_bytes())


def load_profiles(model: ModelSection) -> Profiles:
    """Every profile that a run admits. Raises ConfigError for two of one name, or without a verifier in common."""
    run, *others = (load_profile(name) for name in (model.profile, *model.profiles))
    found = Profiles(run, tuple(others))
    if twice := sorted({name for name in found.names if found.names.count(name) > 1}):
        raise ConfigError(f"two numerics profiles are named {twice[0]!r} in model.profile and model.profiles; name one")
    try:
        found.dtype  # noqa: B018
    except ValueError as error:
        raise ConfigError(f"{error}; calibrate one of them anew, or leave it out of model.profiles") from error
    return found


def _from_file(path: Path) -> Profile:
    try:
        return from_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read numerics profile {path}: {error.strerror}") from error
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError(f"{path} is no numerics profile: {error}; make it anew with `farflung calibrate`") from error
