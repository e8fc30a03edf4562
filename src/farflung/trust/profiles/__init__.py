"""The numerics profiles that come with the package, one JSON file each, made by `farflung calibrate`."""

from importlib import resources

from farflung.protocol.errors import ConfigError
from farflung.trust.evidence import Profile, from_json


def names() -> list[str]:
    """Every profile that comes with the package."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def load_profile(name: str) -> Profile:
    """A profile by name. Raises ConfigError."""
    if name not in names():
        raise ConfigError(f"there is no numerics profile {name!r}; known are {', '.join(names())}")
    return from_json(resources.files(__name__).joinpath(f"{name}.json").read_bytes())
