"""A version of the weights as a GGUF file: matrices in Q4_0, embedding and output head in bfloat16, vectors in float32.

It is laid out once, from the run's `config.json`, and filled again with each version. What llama.cpp would not compute
as transformers does is refused before. No tokenizer is in it: ids go in and come out.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from transformers import PretrainedConfig

from farflung.engine.config_check import metered
from farflung.engine.fit import MOST_BYTES
from farflung.engine.llama_library import INSTALL
from farflung.engine.loading import build, load_strictly, read_slices
from farflung.numerics.q4_0 import BLOCK, BLOCK_BYTES, packed, unpacked
from farflung.numerics.quantise import is_quantised
from farflung.protocol.errors import ConfigError, WeightsError
from farflung.protocol.probe import Slice

NAMES: Final = ("llama", "qwen2", "qwen3")
"""Architectures that are written here; GGUF has them by the same names."""
INTERLEAVED: Final = ("llama",)
"""Those whose heads llama.cpp turns by pairs of neighbours, where transformers turns the halves."""
logging.getLogger("gguf").setLevel(logging.WARNING)  # it tells each file that it writes
_RANGES: Final = {"rms_norm_eps": (0, 1), "max_position_embeddings": (1, 1 << 30), "rope_theta": (1, 1e12)}


class _Place(NamedTuple):
    """A tensor in the file."""

    name: str
    kind: str
    """Q4_0, BF16 or F32."""
    heads: int
    """Heads whose rows are put in llama.cpp's order; 0 for none."""
    shape: tuple[int, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """In bytes."""
        *rows, columns = self.shape
        return *rows, {"Q4_0": columns // BLOCK * BLOCK_BYTES, "BF16": columns * 2, "F32": columns * 4}[self.kind]


class GgufFile:
    """One file, and the model that it is of."""

    def __init__(self, path: Path, config: bytes) -> None:
        """Lay the file out. Raises ConfigError for an architecture that is not written here, or without `gguf`."""
        with torch.device("meta"), metered(MOST_BYTES):
            self._model = build(config, torch.bfloat16)
        settings: PretrainedConfig = self._model.config
        refuse_unknown(settings)
        self.path, self.vocab = path, int(settings.vocab_size)
        self._places = _places(self._model.state_dict(keep_vars=True), settings)
        try:
            self._offsets = _lay_out(path, settings, list(self._places.values()))
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}; free some space there") from error

    def fill(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Write every tensor to its place; each must come once. Raises WeightsError, also for what is not int4's."""
        try:
            with self.path.open("r+b") as file:
                self._file = file
                load_strictly(self._model, tensors, put=self._put, whole=self._read)
        except OSError as error:
            raise WeightsError(f"cannot write the weights to {self.path}: {error.strerror}; free some space") from error

    def values(self, slices: Sequence[Slice]) -> bytes:
        """These slices of what was filled in, in bfloat16."""
        with self.path.open("rb") as file:
            self._file = file
            return read_slices(self._model.state_dict(keep_vars=True), slices, whole=self._read)

    def _put(self, name: str, slot: torch.Tensor, tensor: torch.Tensor) -> None:
        place = self._places[id(slot)]
        self._file.seek(self._offsets[place.name])
        self._file.write(_encoded(name, tensor.detach().cpu(), place).tobytes())

    def _read(self, _name: str, slot: torch.Tensor) -> torch.Tensor:
        place = self._places[id(slot)]
        self._file.seek(self._offsets[place.name])
        stored = np.frombuffer(self._file.read(int(np.prod(place.stored_shape))), np.uint8).copy()
        return _decoded(stored.reshape(place.stored_shape), place)


def refuse_unknown(settings: PretrainedConfig) -> None:
    """Raise ConfigError for a model that llama.cpp would compute in another way, or not at all."""
    kind, rope = settings.model_type, dict(getattr(settings, "rope_parameters", None) or {})
    if kind not in NAMES:
        raise ConfigError(f"the engine llama.cpp has {', '.join(NAMES)}, not {kind}; join with --engine torch")
    wanted: dict[str, tuple[Any, Any]] = {
        "hidden_act": (settings.hidden_act, "silu"),
        "rope_type": (rope.get("rope_type"), "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor") or 1, 1),
        "use_sliding_window": (bool(getattr(settings, "use_sliding_window", False)), False),
        "mlp_bias": (bool(getattr(settings, "mlp_bias", False)), False),
        "attention_bias": (bool(getattr(settings, "attention_bias", False)), False),
    }
    for name, (found, only) in wanted.items():
        if found != only:
            raise ConfigError(
                f"the engine llama.cpp computes {kind} with {name} = {only!r} alone, this model has {found!r}; "
                "join with --engine torch"
            )
    numbers = {name: getattr(settings, name) for name in _RANGES if name != "rope_theta"}
    for name, number in (numbers | {"rope_theta": rope.get("rope_theta")}).items():
        low, high = _RANGES[name]
        if not isinstance(number, int | float) or not low <= number <= high:  # llama.cpp ends the process
            raise ConfigError(f"config.json says {name} = {str(number)[:20]}; llama.cpp takes {low} to {high:g}")


def refuse_missing() -> None:
    """Raise ConfigError where the package that writes such files is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"the engine llama.cpp needs the package {error.name}; {INSTALL}") from error


def _places(slots: dict[str, torch.Tensor], settings: PretrainedConfig) -> dict[int, _Place]:
    """The place of each parameter, by its identity: tied ones have one."""
    import gguf

    kind = settings.model_type
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], settings.num_hidden_layers)
    turned = {"q_proj": settings.num_attention_heads, "k_proj": settings.num_key_value_heads}
    found: dict[int, _Place] = {}
    for name, slot in slots.items():
        if id(slot) in found:
            continue
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ConfigError(f"GGUF has no place for the tensor {name} of a {kind} model; join with --engine torch")
        heads = next((count for part, count in turned.items() if part in name and kind in INTERLEAVED), 0)
        found[id(slot)] = _Place(theirs, _kind(name, slot), heads, tuple(slot.shape))
    return found


def _kind(name: str, slot: torch.Tensor) -> str:
    if slot.ndim < 2:
        return "F32"
    return "Q4_0" if is_quantised(name, slot) and slot.shape[-1] % BLOCK == 0 else "BF16"


def _encoded(name: str, tensor: torch.Tensor, place: _Place) -> np.ndarray:
    """The bytes of a tensor."""
    if place.heads:  # whole rows move, so that blocks stay what they are
        tensor = tensor.unflatten(0, (place.heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    if place.kind == "Q4_0":
        return packed(tensor, name)
    kept = tensor.bfloat16()
    return (kept.float() if place.kind == "F32" else kept).contiguous().view(torch.uint8).numpy()


def _decoded(stored: np.ndarray, place: _Place) -> torch.Tensor:
    """The same back, in bfloat16."""
    if place.kind == "Q4_0":
        tensor = unpacked(stored)
    else:
        kept = torch.from_numpy(stored).view(torch.float32 if place.kind == "F32" else torch.bfloat16)
        tensor = kept.bfloat16()
    if place.heads:
        tensor = tensor.unflatten(0, (place.heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return tensor


def _lay_out(path: Path, settings: PretrainedConfig, places: Sequence[_Place]) -> dict[str, int]:
    """Write all but the values; gives where those of each tensor begin."""
    import gguf

    writer = gguf.GGUFWriter(path, settings.model_type)
    _describe(writer, settings)
    for place in places:
        size = int(np.prod(place.stored_shape))
        kind = gguf.GGMLQuantizationType[place.kind]
        shape = place.shape if place.kind == "F32" else place.stored_shape
        dtype = np.dtype(np.float32 if place.kind == "F32" else np.uint8)
        writer.add_tensor_info(place.name, shape, dtype, size, raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file):
        write()
    assert writer.fout is not None
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    offsets: dict[str, int] = {}
    for place in places:
        offsets[place.name] = file.tell()
        file.seek(writer.ggml_pad(int(np.prod(place.stored_shape)), writer.data_alignment), 1)
    file.truncate()
    writer.close()
    return offsets


def _describe(writer: Any, settings: PretrainedConfig) -> None:
    """The fields of a config that llama.cpp needs."""
    heads = settings.num_attention_heads
    head = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(settings.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    writer.add_rope_freq_base(settings.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(settings.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_quantization_version(2)
