"""The files of a model, in its folder or on the hub. No torch."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from httpx2 import HTTPError

from farflung.protocol.errors import ConfigError

LFS = b"version https://git-lfs"
PATIENCE_S = 5.0
"""How long the hub may take to answer."""
SHOWN = 40
"""Characters of a file that is not what it should be that a message quotes."""


def find(source: str | Path, name: str, *, is_cached: bool = False) -> Path | None:
    """A file of a model, or None where the model has none of that name.

    On the hub it is fetched, or looked for in the cache alone. Raises ConfigError for a model that is nowhere.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    return _cached(str(source), name) if is_cached else _from_hub(str(source), name)


def read(source: str | Path, name: str) -> bytes | None:
    """The bytes of a small file of a model. Raises ConfigError for one that cannot be read or stands for another."""
    path = find(source, name)
    if path is None:
        return None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); make it readable") from error
    refuse_pointer(path, data)
    return data


def read_json(source: str | Path, name: str) -> dict[str, Any] | None:
    """A small JSON file of a model; None where it has none. Raises ConfigError for one that holds no JSON object."""
    data = read(source, name)
    return None if data is None else parse(data, f"{name} of model {str(source)!r}")


def parse(data: bytes, what: str) -> dict[str, Any]:
    """The fields of a JSON object. Raises ConfigError."""
    try:
        fields = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what} is no JSON ({error}), it begins with {_begin(data)}; download it again") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{what} holds no JSON object, it begins with {_begin(data)}; download it again")
    return fields


def refuse_pointer(path: Path, data: bytes) -> None:
    """Raises ConfigError for what git leaves in place of a large file."""
    if data.startswith(LFS):
        raise ConfigError(
            f"{path} is a git-lfs pointer and not the file itself; run `git lfs pull` in the folder {path.parent}"
        )


@cache
def is_cut_off(source: str) -> bool:
    """Whether a model is on the hub and the hub does not answer; asked once in the life of a process.

    The hub's own client asks six times in half a minute, and again for every file that is not there.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if Path(source).is_dir():
        return False
    try:
        get_hf_file_metadata(hf_hub_url(source, "config.json"), timeout=PATIENCE_S)
    except (HfHubHTTPError, HFValidationError):
        return False  # an answer, or no question
    except (HTTPError, OSError):
        return True
    return False


def _begin(data: bytes) -> str:
    return repr(data[:SHOWN].decode("utf-8", "replace"))


def _cached(name: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, file)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _from_hub(name: str, file: str) -> Path | None:
    """Absent from the repository, or from the cache while there is no way to the hub, is None."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(name, file, local_files_only=is_cut_off(name)))
    except EntryNotFoundError:
        return None
    except GatedRepoError as error:
        raise ConfigError(
            f"model {name!r} is gated on the hub: accept its terms there, then log in here with `hf auth login`"
        ) from error
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise ConfigError(
            f"model path {name!r} is no folder, and no such model can be had from the hub ({type(error).__name__}); "
            "name a folder of a Hugging Face causal LM or its hub id"
        ) from error
