"""Builds a model from its configuration alone and fills it strictly from named tensors."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules import module
from transformers import AutoConfig, PreTrainedModel

from farflung.engine.config_check import check_config
from farflung.numerics.making import ODD, ONE_AT_A_TIME, without_weights
from farflung.protocol.errors import ConfigError, WeightsError
from farflung.protocol.probe import Slice

_NEVER = ("auto_map", "quantization_config")
"""Keys that would make transformers look for foreign Python code or repack the weights."""


def build(config: Path | str | bytes, dtype: torch.dtype, device: torch.device | str | None = None) -> PreTrainedModel:
    """A model of the architecture that `config.json` (its bytes, or the folder it is in) describes.

    Its weights are whatever lay in memory, on `device` from the start. Raises ConfigError.
    """
    fields = read_config(config)
    try:
        settings = AutoConfig.for_model(**{key: value for key, value in fields.items() if key not in _NEVER})
        with ONE_AT_A_TIME, _placing(device):
            model = without_weights(settings, dtype)
    except ODD as error:
        raise ConfigError(f"config.json describes no causal language model that transformers knows: {error}") from error
    return (model if device is None else model.to(device)).eval().requires_grad_(False)


@contextmanager
def _placing(device: torch.device | str | None) -> Iterator[None]:
    """Each parameter goes to the device as it is made, so that this machine's memory never holds the model.

    Tables of rotations are computed here, to the same bits for every device.
    """
    if device is None or torch.device(device).type == "cpu":
        yield
        return

    def place(_: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> torch.nn.Parameter | None:
        if parameter is None or parameter.is_meta or parameter.device.type != "cpu":
            return parameter  # one that is there already is tied to another
        return torch.nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)

    handle = module.register_module_parameter_registration_hook(place)
    try:
        yield
    finally:
        handle.remove()


def read_config(config: Path | str | bytes) -> dict[str, Any]:
    """The fields of `config.json`, given as bytes or as the folder it is in."""
    try:
        text = config if isinstance(config, bytes) else (Path(config) / "config.json").read_bytes()
        fields = json.loads(text, object_hook=_plain)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"no readable config.json: {error}") from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise ConfigError("config.json names no model_type; take it from the model's own folder")
    check_config(fields)
    return fields


def _plain(fields: dict[str, Any]) -> Any:
    """A value that JSON has no number for is written by transformers as {"__float__": "Infinity"}."""
    return float(fields["__float__"]) if fields.keys() == {"__float__"} else fields


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """End-of-sequence ids, from the generation config if it names any, else from the model config."""
    generation = getattr(model, "generation_config", None)
    for source in (generation, model.config.get_text_config()):
        eos = getattr(source, "eos_token_id", None)
        if eos is not None:
            return frozenset(eos if isinstance(eos, list | tuple) else [eos])
    return frozenset()


def _copy(_name: str, slot: torch.Tensor, tensor: torch.Tensor) -> None:
    slot.copy_(tensor)


def _itself(_name: str, slot: torch.Tensor) -> torch.Tensor:
    return slot


@torch.no_grad()
def load_strictly(
    model: PreTrainedModel,
    tensors: Iterable[tuple[str, torch.Tensor]],
    put: Callable[[str, torch.Tensor, torch.Tensor], None] = _copy,
    whole: Callable[[str, torch.Tensor], torch.Tensor] = _itself,
) -> None:
    """Copy every tensor into its place, cast to the model's precision; each must come exactly once.

    Tied weights (an output head that is the embedding) need one of their names; where several come they must agree.
    `put` copies (name, place, tensor) where a place is not whole, and `whole` gives all that is there. Raises
    WeightsError, after which the model holds a mixture and must not be used.
    """
    slots = model.state_dict(keep_vars=True)
    given: set[str] = set()
    filled: set[int] = set()
    for name, tensor in tensors:
        _refuse_misfit(name, tensor, slots, given)
        given.add(name)
        slot = slots[name]
        if id(slot) in filled:
            _refuse_torn(name, whole(name, slot), tensor)
        else:
            put(name, slot, tensor)
        filled.add(id(slot))
    missing = [name for name, slot in slots.items() if id(slot) not in filled]
    if missing:
        raise WeightsError(f"{len(missing)} tensors are missing from the weights, the first is {missing[0]}")


def read_slices(
    tensors: Mapping[str, torch.Tensor],
    slices: Sequence[Slice],
    whole: Callable[[str, torch.Tensor], torch.Tensor] = _itself,
) -> bytes:
    """The values of some slices in bfloat16, little-endian. Raises WeightsError for a tensor that is not there.

    `whole` puts together a tensor that is not whole.
    """
    missing = [part.name for part in slices if part.name not in tensors]
    if missing:
        raise WeightsError(f"this model has no tensor {missing[0]}; weights and config.json belong to different models")
    return in_bfloat16(whole(name, tensors[name]).detach().flatten()[start:stop] for name, start, stop in slices)


def in_bfloat16(parts: Iterable[torch.Tensor]) -> bytes:
    """The values of some flat tensors, one after the other, as `read_slices` gives them."""
    found = [part.to(torch.bfloat16).cpu() for part in parts]
    return torch.cat(found).view(torch.int16).numpy().tobytes() if found else b""


def _refuse_torn(name: str, held: torch.Tensor, tensor: torch.Tensor) -> None:
    if not torch.equal(held, tensor.to(held)):
        raise WeightsError(f"tensor {name} is tied to another one of the checkpoint and differs from it")


def _refuse_misfit(name: str, tensor: torch.Tensor, slots: dict[str, torch.Tensor], given: set[str]) -> None:
    if name not in slots:
        raise WeightsError(
            f"tensor {name} is unknown to this model; weights and config.json belong to different models"
        )
    if name in given:
        raise WeightsError(f"tensor {name} came twice")
    if tensor.shape != slots[name].shape:
        raise WeightsError(f"tensor {name} has shape {list(tensor.shape)}, the model {list(slots[name].shape)}")
    if tensor.is_floating_point() != slots[name].is_floating_point():
        raise WeightsError(f"tensor {name} is of type {tensor.dtype}, the model's of {slots[name].dtype}")
