"""The model of a `config.json` as mlx-lm has it, filled strictly from named tensors.

mlx-lm knows a config by other names than transformers gives its fields, and leaves out what it does not know without a
word. So only kinds of models are built that were compared with the embedded engine (`TRIED`), from the fields as
transformers reads them, and only if parameter by parameter the two are laid out alike.
"""

from collections.abc import Iterable, Sequence
from importlib import import_module
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.utils import MODEL_REMAPPING
from transformers import PretrainedConfig, PreTrainedModel

from farflung.engine.loading import build, load_strictly, read_slices
from farflung.numerics.devices import name_of
from farflung.numerics.making import ODD
from farflung.protocol.errors import ConfigError
from farflung.protocol.probe import Slice

TRIED = ("gemma3_text", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
"""Kinds of models that the tests compare with the embedded engine."""
ROPES = ("default", "linear", "llama3", "yarn")
"""The same of rotations; those of others depend on a text's length."""
INSTEAD = "generate with --engine torch, or join another run"


class MlxModel:
    """A model of MLX, and beside it what transformers makes of the same config, which takes no memory."""

    def __init__(self, config: Path | str | bytes, dtype: torch.dtype) -> None:
        """Without its weights. Raises ConfigError for a model that mlx-lm computes in another way, or not at all."""
        with torch.device("meta"):
            self.layout = build(config, dtype)
        self.dtype = dtype
        self.compute = _built(mlx_fields(self.layout.config, dtype))
        _refuse_other_layout(self.compute, self.layout)
        self._names = {id(slot): name for name, slot in _own(self.layout).items()}
        self._head = self._names[id(self.layout.get_output_embeddings().weight)]
        _hold_head_apart(self.compute, self._head.removesuffix(".weight").split("."), _in_mlx(dtype))

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Fill it; what was there goes first, so that two versions never lie beside each other. Raises WeightsError."""
        self.compute.update(tree_map(lambda one: mx.zeros(one.shape, one.dtype), self.compute.parameters()))
        load_strictly(self.layout, tensors, self._put, self._held)

    def values(self, slices: Sequence[Slice]) -> bytes:
        """These slices of the weights in bfloat16. Raises WeightsError for a tensor that is not there."""
        asked = {one.name for one in slices}
        slots = {name: slot for name, slot in self.layout.state_dict(keep_vars=True).items() if name in asked}
        return read_slices({name: self._held(name, slot) for name, slot in slots.items()}, slices)

    def _put(self, _: str, slot: torch.Tensor, tensor: torch.Tensor) -> None:
        name, array = self._names[id(slot)], in_mlx(tensor.detach().to("cpu", self.dtype))
        array = array.astype(mx.float32) if name == self._head else array
        mx.eval(array)
        self.compute.update(tree_unflatten([(name, array)]))

    def _held(self, _: str, slot: torch.Tensor) -> torch.Tensor:
        array: Any = self.compute
        for part in self._names[id(slot)].split("."):
            array = array[int(part) if part.isdecimal() else part]
        return in_torch(array).to(self.dtype)


def in_mlx(tensor: torch.Tensor) -> mx.array:
    """A copy of a tensor of this machine's memory."""
    if tensor.dtype == torch.bfloat16:  # numpy has none
        return mx.array(tensor.contiguous().view(torch.int16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.contiguous().numpy())


def in_torch(array: mx.array) -> torch.Tensor:
    """An array as torch sees it, in the same memory."""
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.int16), copy=False)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, copy=False))


def _in_mlx(dtype: torch.dtype) -> mx.Dtype:
    return getattr(mx, str(dtype).removeprefix("torch."))


def _built(fields: dict[str, Any]) -> Any:
    kind = fields["model_type"]
    try:
        source = import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(kind, kind)}")
        return source.Model(source.ModelArgs.from_dict(fields)).eval()
    except (ImportError, *ODD) as error:
        raise ConfigError(f"mlx-lm cannot build this {kind}: {error}; {INSTEAD}") from error


def mlx_fields(settings: PretrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of a config in mlx-lm's words. Raises ConfigError for what it would leave out."""
    fields = settings.to_dict()
    kind, act = fields["model_type"], fields.get("hidden_act") or fields.get("hidden_activation")
    if kind not in TRIED:
        raise ConfigError(f"the engine mlx has {', '.join(TRIED)}, not {kind!r}; {INSTEAD}")
    if act != ("gelu_pytorch_tanh" if kind == "gemma3_text" else "silu"):
        raise ConfigError(f"mlx-lm has no {kind} with the activation {act!r}; {INSTEAD}")
    kinds = fields.get("layer_types") or ["full_attention"] * fields["num_hidden_layers"]
    if kind == "gemma3_text":
        _refuse_rounded_scale(fields["hidden_size"], dtype)
        fields |= {"sliding_window_pattern": _pattern(kinds), "rope_local_base_freq": _rope(fields, kinds[0])[0]}
    elif set(kinds) != {"full_attention"} or fields.get("sliding_window"):
        raise ConfigError(f"mlx-lm has no sliding windows in {kind}; {INSTEAD}")
    theta, scaling = _rope(fields, "full_attention")
    return fields | {"rope_theta": theta, "rope_scaling": scaling}


def _refuse_rounded_scale(width: int, dtype: torch.dtype) -> None:
    """Raise ConfigError where mlx-lm rounds the scale of embeddings to bfloat16 and the embedded engine does not."""
    scale = torch.tensor(width**0.5)
    if scale.bfloat16().to(dtype) != scale.to(dtype):
        raise ConfigError(
            f"mlx-lm scales embeddings of {width} values by {scale.bfloat16():.4f} where {scale:.4f} is right in "
            f"{name_of(dtype)}; take a profile in bfloat16, or {INSTEAD}"
        )


def _pattern(kinds: list[str]) -> int:
    """Every how many layers one attends to all."""
    size = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    expected = ["sliding_attention"] * (size - 1) + ["full_attention"]
    if kinds != list(islice(cycle(expected), len(kinds))) or size > len(kinds):
        raise ConfigError(f"mlx-lm has no gemma3_text with layers in this order: {', '.join(kinds[:8])}; {INSTEAD}")
    return size


def _rope(fields: dict[str, Any], kind: str) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling of a kind of layer."""
    rope = fields["rope_parameters"]
    rope = rope.get(kind, rope)
    if rope.get("rope_type", "default") not in ROPES:
        raise ConfigError(f"the engine mlx has rotations {', '.join(ROPES)}, not {rope['rope_type']!r}; {INSTEAD}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"the engine mlx turns whole heads, not {rope['partial_rotary_factor']} of them; {INSTEAD}")
    return rope["rope_theta"], None if rope.get("rope_type", "default") == "default" else rope


def _refuse_other_layout(model: Any, layout: PreTrainedModel) -> None:
    """Raise ConfigError where mlx-lm has other tensors than are published, or changes them on their way in.

    Possession of the weights is shown by the values that are published. Nothing here takes memory: MLX is lazy.
    """
    given = {name: mx.zeros(tuple(slot.shape)) for name, slot in _own(layout).items()}
    taken = model.sanitize(dict(given)) if hasattr(model, "sanitize") else given
    held = {name: one.shape for name, one in tree_flatten(model.parameters())}
    odd = [name for name, one in given.items() if taken.get(name) is not one or held.get(name) != one.shape]
    odd += sorted(held.keys() - given.keys())
    if odd:
        raise ConfigError(f"mlx-lm lays out this model in another way, tensor {odd[0]} for one; {INSTEAD}")


def _own(layout: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every tensor by one name, the first of those that are tied."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, slot in layout.state_dict(keep_vars=True).items():
        found.setdefault(id(slot), (name, slot))
    return dict(found.values())


def _hold_head_apart(model: Any, path: list[str], dtype: mx.Dtype) -> None:
    """Put a head that computes in float32 in the place of the model's own."""
    for part in path[:-1]:
        model = model[part]
    head = model[path[-1]]
    size, width = head.weight.shape
    model[path[-1]] = (
        TiedHead(size, width, dtype) if isinstance(head, nn.Embedding) else OutputHead(width, size, "bias" in head)
    )


class OutputHead(nn.Linear):
    """An output head that computes in float32 whatever comes: its weights are so, and rounded logits change picks."""

    def __call__(self, x: mx.array) -> mx.array:
        """Logits."""
        return super().__call__(x.astype(mx.float32))


class TiedHead(nn.Embedding):
    """The same where it is the embedding too, which gives the model what its other weights are of."""

    def __init__(self, size: int, width: int, dtype: mx.Dtype) -> None:
        """Of `size` tokens."""
        super().__init__(size, width)
        self._dtype = dtype

    def __call__(self, x: mx.array) -> mx.array:
        """Embeddings of ids."""
        return super().__call__(x).astype(self._dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits."""
        return super().as_linear(x.astype(mx.float32))
