"""The numerics profiles that come with the package, one JSON file each, made by `farflung calibrate`."""

from importlib import resources
from pathlib import Path

import msgspec

from farflung.protocol.errors import ConfigError
from farflung.trust.evidence import Profile, from_json


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


def _from_file(path: Path) -> Profile:
    try:
        return from_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read numerics profile {path}: {error.strerror}") from error
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError(f"{path} is no numerics profile: {error}") from error
