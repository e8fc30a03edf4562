"""Files, names, shapes and faults of a model's weights, found before anybody loads them.

safetensors files begin with a header in JSON, so that names and shapes take a moment however large the model is. Files
in other formats are never opened: a pickle runs whatever it says. No torch.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from farflung.numerics.model_files import LFS, find, parse, refuse_pointer
from farflung.protocol.errors import ConfigError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LENGTH_BYTES = 8
MOST_HEADER_BYTES = 100_000_000
"""As safetensors itself."""
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
OTHER = ("*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.npz")
ITEM_BITS = {"F4": 4, "BOOL": 8, "F8": 8, "I8": 8, "U8": 8, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}
ITEM_BITS |= {"F32": 32, "I32": 32, "U32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64}
READ_AS = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "BF16": np.uint16}
BF16_EXPONENT = 0x7F80
CHUNK = 1 << 24
NOT_FINITE = (
    "tensor {name} of {place} has values that are infinite or no numbers (NaN): the checkpoint is damaged, or its "
    "training diverged; take an earlier one"
)
PATIENCE_S = 3.0
"""How long values are looked at without a word."""


class Entry(NamedTuple):
    """One tensor of a file: its type and shape, and where its bytes are."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def entries(source: str | Path) -> dict[str, Entry]:
    """Every tensor of a model by name, out of the headers; none for a hub id whose weights are not on this machine.

    Raises ConfigError for weights that are missing, cut off, in another format, or quantised.
    """
    found: dict[str, Entry] = {}
    for path in files(source):
        found |= read_header(path)
    _refuse_packed(source, found)
    return found


def files(source: str | Path) -> list[Path]:
    """The safetensors files of a model, as transformers chooses them. Raises ConfigError where there are none."""
    if (whole := find(source, WHOLE, is_cached=True)) is not None:
        return [whole]
    if (index := find(source, INDEX, is_cached=True)) is not None:
        return _shards(source, index)
    if Path(source).is_dir():
        raise ConfigError(_why_none(Path(source)))
    return []


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file. Raises ConfigError for a file that is none, or not the whole of one."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(LFS))
            refuse_pointer(path, begin)
            length = int.from_bytes(begin[:LENGTH_BYTES], "little")
            size = path.stat().st_size
            if len(begin) < LENGTH_BYTES or length > min(MOST_HEADER_BYTES, size - LENGTH_BYTES):
                raise ConfigError(f"{path} is no safetensors file, or cut off after {size} bytes; {_AGAIN}")
            file.seek(LENGTH_BYTES)
            fields = json.loads(file.read(length))
        found = {name: _entry(path, one, LENGTH_BYTES + length) for name, one in fields.items() if name[:2] != "__"}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); make it readable") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is no safetensors file, its header cannot be read; {_AGAIN}") from error
    promised = max((one.stop for one in found.values()), default=LENGTH_BYTES + length)
    if promised != size:
        raise ConfigError(f"{path} has {size} bytes where its header promises {promised}: it is damaged; {_AGAIN}")
    return found


_AGAIN = "copy or download it again"


def refuse_infinite(found: dict[str, Entry], say: Callable[[str], object]) -> None:
    """Raise ConfigError for a tensor with a value that is not a finite number; says so if that takes a while."""
    since, is_told = time.monotonic(), False
    for name, one in found.items():
        if not is_told and time.monotonic() - since > PATIENCE_S:
            is_told = True
            say(f"looking through {sum(one.stop - one.start for one in found.values()) / 1e9:.1f} GB of weights")
        if not all(map(_is_finite, _values(one))):
            raise ConfigError(NOT_FINITE.format(name=name, place=one.file))


def refuse_quantised(fields: Mapping[str, Any], source: Path | str) -> None:
    """Raises ConfigError for a config.json of weights that were repacked: they cannot be trained."""
    for one in (fields, fields.get("text_config")):
        for name in ("quantization_config", "compression_config"):
            if isinstance(one, Mapping) and (found := one.get(name)):
                how = found.get("quant_method", name) if isinstance(found, dict) else name
                raise ConfigError(
                    f"model {str(source)!r} is quantised ({how}, by {name} in its config.json), and only whole weights "
                    "can be trained; take the model that it was made from"
                )


def is_same(one: Entry, other: Entry) -> bool:
    """Whether two tensors hold the same values, as far as their type is the same."""
    if one.dtype != other.dtype:
        return True  # loading them tells
    pairs = zip(_values(one), _values(other), strict=False)
    return one.shape == other.shape and all(np.array_equal(mine, theirs) for mine, theirs in pairs)


def _values(one: Entry) -> Iterator[np.ndarray]:
    """The values of a tensor as they lie in the file, some at a time; none for a type that is always finite."""
    kind = READ_AS.get(one.dtype)
    if kind is None or one.start == one.stop:
        return
    values = np.memmap(one.file, np.uint8, "r", one.start, (one.stop - one.start,)).view(kind)
    for start in range(0, len(values), CHUNK):
        yield values[start : start + CHUNK]


def _is_finite(values: np.ndarray) -> bool:
    if values.dtype == np.uint16:
        return not ((values & BF16_EXPONENT) == BF16_EXPONENT).any()
    return bool(np.isfinite(values).all())


def _entry(path: Path, one: dict[str, Any], offset: int) -> Entry:
    """Raises ValueError, TypeError or KeyError for what no header says."""
    shape, (start, stop) = tuple(map(int, one["shape"])), one["data_offsets"]
    bits = ITEM_BITS[one["dtype"].split("_")[0]]
    if not 0 <= start <= stop or min(shape, default=0) < 0 or math.prod(shape) * bits != 8 * (stop - start):
        raise ValueError("shape and bytes disagree")
    return Entry(path, one["dtype"], shape, offset + start, offset + stop)


def _shards(source: str | Path, index: Path) -> list[Path]:
    fields = parse(index.read_bytes(), str(index))
    places = fields.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()) or not places:
        raise ConfigError(f"{index} has no weight_map that names the shards; {_AGAIN}")
    names = sorted(set(places.values()))
    found = [find(source, name, is_cached=True) for name in names if Path(name).name == name]
    shards = [path for path in found if path is not None]
    if len(shards) < len(names):
        if not Path(source).is_dir():
            return []  # not all of it has been fetched
        absent = next(name for name in names if find(source, name) is None or Path(name).name != name)
        raise ConfigError(f"shard {absent} of the {len(names)} that {index} names is missing; copy or download it")
    return shards


def _why_none(folder: Path) -> str:
    """Why a folder without weights in safetensors has none, and what to do."""
    if (folder / "adapter_config.json").exists() or list(folder.glob("adapter_model.*")):
        return (
            f"{folder} holds an adapter (LoRA) and no model; merge it into its base model with peft's "
            "merge_and_unload(), save that with save_pretrained(), and name its folder in model.path"
        )
    if shards := sorted(path.name for path in folder.glob("*.safetensors")):
        return f"{folder} holds {shards[0]}, but neither {WHOLE} nor the {INDEX} that names shards; copy that too"
    if pickled := sorted(path.name for kind in PICKLED for path in folder.glob(kind)):
        return (
            f"{folder} has its weights in {pickled[0]} alone, a format that can run code and is never opened here; if "
            f"you trust it, convert it to safetensors: {CONVERT.format(folder=folder)}"
        )
    if other := sorted(path.name for kind in OTHER for path in folder.glob(kind)):
        return f"{folder} has its weights in {other[0]} alone; take the model's safetensors files"
    return f"{folder} has no weights, there is no {WHOLE} in it; copy or download the model's safetensors files"


CONVERT = (
    'python -c "from transformers import AutoModelForCausalLM as Model; '
    "Model.from_pretrained('{folder}', dtype='auto', use_safetensors=False).save_pretrained('{folder}')\""
)

QUANTISED = ("qweight", "qzeros", "weight_scale", "weight_scale_inv", "absmax", "quant_map", "SCB", "weight_packed")
"""Last parts of names that only quantised checkpoints have."""


def _refuse_packed(source: str | Path, found: dict[str, Entry]) -> None:
    for name, one in found.items():
        if name.rsplit(".", 1)[-1] in QUANTISED or one.dtype.startswith(("F8", "F4")):
            raise ConfigError(
                f"model {str(source)!r} is quantised: tensor {name} is stored as {one.dtype}; only whole weights can "
                "be trained, so take the model that it was made from (bfloat16, float16 or float32)"
            )
