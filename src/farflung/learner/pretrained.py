"""The base model with its own weights, loaded as strictly as strangers' are: nothing of it is drawn at random."""

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from farflung.learner.lora import adapters
from farflung.learner.ranks import Ranks, add_up, local, own_rows, share_of
from farflung.learner.row_reader import RowReader
from farflung.numerics import making
from farflung.numerics.model_files import is_cut_off, read_json
from farflung.numerics.weight_files import NOT_FINITE, entries, files, refuse_quantised
from farflung.protocol.errors import ConfigError

log = logging.getLogger(__name__)
TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
PREFIXES = {
    r"^(?:(?:_orig_mod|_fsdp_wrapped_module|module|base_model\.model|base_model)\.)+": "",
    r"\._orig_mod\.": ".",
    r"\._fsdp_wrapped_module\.": ".",
    r"\._checkpoint_wrapped_module\.": ".",
}
"""Parts that torch.compile, FSDP, DDP and PEFT put into the names of tensors: pattern → the text in their place."""
ODD = (*making.ODD, OSError, SafetensorError)
"""Errors that transformers raises for a model that it cannot load."""


def load_pretrained(source: Path | str, dtype: torch.dtype) -> PreTrainedModel:
    """A base model with its own weights, of a folder or a hub id.

    As strict as `load_strictly` of `engine/loading.py`: every tensor of the model comes from the files, in its shape
    and finite. Names may have what wrappers put before them; tensors that the model has no place for are left, with a
    warning. safetensors alone, no remote code. Raises ConfigError.
    """
    entries(source)
    model = _loaded(source, dtype)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ConfigError(NOT_FINITE.format(name=name, place=f"model {str(source)!r}"))
    return model.eval()


def skeleton(source: Path | str) -> PreTrainedModel:
    """A model of a folder's or hub id's config.json, float32, whose weights are what lay in memory.

    On a CPU memory that nobody has touched costs addresses alone, so it may be larger than the machine.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=is_cut_off(str(source)))
        return making.without_weights(config, torch.float32).eval()
    except ODD as error:
        raise _cannot_load(source, str(error)) from error


@torch.no_grad()
def fill_shares(
    model: PreTrainedModel,
    source: Path | str,
    ranks: Ranks,
    change: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
) -> None:
    """Give a sharded model its weights; every rank reads its own rows from the files. Raises ConfigError.

    `change` makes of some values of a tensor, and of how many come before them, those that are kept. Files whose names
    or shapes are not the model's are left to `load_pretrained`, which says why, or knows how.
    """
    own = {name for name, _ in adapters(model)}
    slots = {name: slot for name, slot in model.state_dict(keep_vars=True).items() if name not in own}
    renamed = {name: _short(name) for name in entries(source)}
    with RowReader(files(source), renamed) as reader:
        shapes = reader.shapes
        given = {id(slot) for name, slot in slots.items() if shapes.get(name) == slot.shape}
        if all(id(slot) in given and shapes.get(name, slot.shape) == slot.shape for name, slot in slots.items()):
            mine = {name: slot for name, slot in slots.items() if name in shapes}
            return _fill(mine, lambda name: reader.rows(name, *own_rows(slots[name])), source, ranks, change)
    whole = load_pretrained(source, torch.float32).state_dict()
    return _fill(slots, lambda name: local(share_of(whole[name], slots[name])), source, ranks, change)


def _short(name: str) -> str:
    """A name without what wrappers put into it."""
    for pattern, text in PREFIXES.items():
        name = re.sub(pattern, text, name)
    return name


def _fill(
    slots: Mapping[str, torch.Tensor],
    share: Callable[[str], torch.Tensor],
    source: Path | str,
    ranks: Ranks,
    change: Callable[[torch.Tensor, int], torch.Tensor] | None,
) -> None:
    """Copy this rank's share of each tensor into its place; all ranks are told of one that is not finite."""
    odd = -1.0
    for number, (name, slot) in enumerate(slots.items()):
        values = share(name)
        if values.is_floating_point() and not torch.isfinite(values).all():
            odd = float(number)
        before = own_rows(slot)[0] * math.prod(slot.shape[1:])
        local(slot.detach()).copy_(values if change is None else change(values, before))
    (odd,) = add_up((odd,), ranks, is_most=True)
    if odd >= 0:
        raise ConfigError(NOT_FINITE.format(name=list(slots)[int(odd)], place=f"model {str(source)!r}"))


def check_pretrained(source: Path | str) -> None:
    """Raise ConfigError for weights and a config.json that do not belong together; nothing is said of the hub's.

    In the type of its files a model is mapped into memory and not copied, so this takes a moment.
    """
    if stored := entries(source):
        kinds = Counter(one.dtype for one in stored.values() if one.dtype in TYPES)
        _loaded(source, TYPES[kinds.most_common(1)[0][0]] if kinds else torch.float32)


def _loaded(source: Path | str, dtype: torch.dtype) -> PreTrainedModel:
    fields = read_json(source, "config.json") or {}
    refuse_quantised(fields, source)
    try:
        model, said = _filled(source, dtype)
    except ODD as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if "auto_map" in fields:
            reason = [f"a {fields.get('model_type')} wants code of its own, auto_map in config.json, that is never run"]
        raise _cannot_load(source, reason[0]) from error
    _refuse_gaps(source, said)
    _refuse_torn(source, model)
    return model


def _cannot_load(source: Path | str, reason: str) -> ConfigError:
    return ConfigError(
        f"model {str(source)!r} cannot be loaded ({reason}); name a folder of a Hugging Face causal LM that "
        "transformers knows without code of its own, or its hub id"
    )


def _filled(source: Path | str, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, with torch's own attention or else its own, and what transformers tells of names and shapes."""
    make = partial(
        AutoModelForCausalLM.from_pretrained,
        source,
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=is_cut_off(str(source)),
        key_mapping=PREFIXES,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    return making.with_attention(make)


def _refuse_gaps(source: Path | str, said: Mapping[str, Any]) -> None:
    """Raise ConfigError for tensors that transformers drew at random: those that are absent, or of another shape."""
    for name, theirs, ours in sorted(said["mismatched_keys"]):
        raise ConfigError(
            f"tensor {name} of model {str(source)!r} has shape {list(theirs)}, by config.json {list(ours)}; weights "
            "and config.json belong to different models, take both from the same"
        )
    if missing := sorted(said["missing_keys"]):
        raise ConfigError(
            f"the weights of model {str(source)!r} lack {len(missing)} of its tensors, the first is {missing[0]}; take "
            "the whole checkpoint and the config.json that belongs to it (tie_word_embeddings: true where the head is "
            "the embedding)"
        )
    if unused := sorted(said["unexpected_keys"]):
        log.warning("unused tensors=%d first=%s model=%s", len(unused), unused[0], source)


def _refuse_torn(source: Path | str, model: PreTrainedModel) -> None:
    """Raise ConfigError for tied tensors that came with different values: transformers unties them."""
    for one, other in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter_or_buffer(one) is not model.get_parameter_or_buffer(other):
            raise ConfigError(
                f"tensors {one} and {other} of model {str(source)!r} differ, though config.json ties them; set "
                "tie_word_embeddings to false there, or take the model's own files"
            )
