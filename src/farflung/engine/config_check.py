"""Bounds on the model that a stranger's `config.json` may have this machine build, checked before and during it.

A few hundred bytes can ask for ten thousand layers. So the fields are bounded first, and what is then built without
memory is counted as it grows: it ends where its bytes, its tensors or its time come to more than is allowed.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn.modules import module

from farflung.numerics.making import ONE_AT_A_TIME
from farflung.protocol.errors import ConfigError, WeightsError

DEPTH, FIELDS = 16, 20_000
"""Nesting and fields of a config; the largest in use have 5 and some 2,000."""
MOST = {"layer": 512, "block": 512, "depth": 512, "expert": 1024, "stage": 64}
"""Largest number in a field by a word in its name; the largest in use are 126 layers, 384 experts."""
COUNTED = ("num_", "n_", "_layers", "_experts", "depth", "layers", "encoder_layers", "decoder_layers")
"""How names of fields that count something begin or end; others are sizes."""
LARGEST = 2**31 - 1
UNBOUNDED = ("time_step_limit",)
"""Fields of a range whose upper end transformers itself writes as infinity: Mamba 2, Falcon H1, Bamba and others."""
TENSORS, BUILD_S = 100_000, 20.0
"""Tensors of a model, and seconds of a core to build it without memory: DeepSeek V3 has 1,500 and takes 2 s."""


def check_config(fields: dict[str, Any]) -> None:
    """Raises ConfigError for a config that is nested, long, or has numbers as no model has."""
    todo, seen = [("", cast(Any, fields), 0)], 0
    while todo:
        name, value, depth = todo.pop()
        seen += 1
        if depth > DEPTH or seen > FIELDS:
            raise ConfigError(
                f"config.json is nested deeper than {DEPTH} or has more than {FIELDS} fields; no model's is"
            )
        if isinstance(value, dict):
            todo += [(str(key), one, depth + 1) for key, one in cast(dict[Any, Any], value).items()]
        elif isinstance(value, list):
            todo += [(name, one, depth + 1) for one in cast(list[Any], value)]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            _check_number(name, value)


def _check_number(name: str, value: float) -> None:
    most = min((most for word, most in MOST.items() if word in name and _counts(name)), default=LARGEST)
    if name in UNBOUNDED and value == float("inf"):
        return
    if not -LARGEST <= value <= most:  # a float that is none too
        raise ConfigError(f"config.json says {name} = {str(value)[:20]}; at most {most} are built here")


def _counts(name: str) -> bool:
    return name.startswith(COUNTED) or name.endswith(COUNTED)


@dataclass
class Meter:
    """The size and number of tensors built so far."""

    bytes: int = 0
    tensors: int = 0


@contextmanager
def metered(limit_bytes: float) -> Iterator[Meter]:
    """Count every parameter and buffer that is built inside. Raises WeightsError as soon as they are too many."""
    meter, since = Meter(), time.thread_time()

    def count(_: torch.nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        if tensor is None:
            return
        meter.tensors += 1
        meter.bytes += tensor.numel() * tensor.element_size()
        if meter.bytes > limit_bytes:
            raise WeightsError(
                f"the run's model takes more than {limit_bytes / 1e9:,.1f} GB, more than any that is known; "
                "join another run"
            )
        if meter.tensors > TENSORS or time.thread_time() - since > BUILD_S:
            raise WeightsError(
                f"the run's model has more than {TENSORS:,} tensors, or is not laid out within {BUILD_S:.0f} s; "
                "join another run"
            )

    with ONE_AT_A_TIME:  # the hooks are the whole process's
        handles = [
            module.register_module_parameter_registration_hook(count),
            module.register_module_buffer_registration_hook(count),
        ]
        try:
            yield meter
        finally:
            for handle in handles:
                handle.remove()
