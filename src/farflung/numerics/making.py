"""Calls to transformers that make a model, from its configuration alone or with weights, and the errors they raise."""

from collections.abc import Callable
from functools import partial
from threading import RLock
from typing import Final, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

Made = TypeVar("Made")
ODD: Final = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    ImportError,
    StrictDataclassError,
)
"""Errors that transformers raises for fields that it did not expect."""
ONE_AT_A_TIME: Final = RLock()
"""Held while a model is made. transformers turns off torch's initialisation and its own tying of weights, and sets the
default precision, for the whole process; two threads that do so at once put back each other's, and it stays off."""


def with_attention(make: Callable[..., Made]) -> Made:
    """The model made with torch's own attention, or with its own where it does not know torch's."""
    with ONE_AT_A_TIME:
        try:
            return make(attn_implementation="sdpa")
        except ValueError:
            return make(attn_implementation="eager")


def without_weights(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose weights are whatever lay in memory: drawing 135 million takes two seconds, and others come anyway.

    Only classes inside transformers are considered: no remote code. Raises `ODD`.
    """
    with ONE_AT_A_TIME:
        with no_init_weights():
            make = partial(AutoModelForCausalLM.from_config, config, dtype=dtype, trust_remote_code=False)
            model = with_attention(make)
        model.tie_weights()  # part of what was left out
    return model
