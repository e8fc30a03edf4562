"""Calls to transformers that make a model, from its configuration alone or with weights, and the errors they raise."""

from collections.abc import Callable
from typing import Final, TypeVar

from huggingface_hub.errors import StrictDataclassError

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


def with_attention(make: Callable[..., Made]) -> Made:
    """The model made with torch's own attention, or with its own where it does not know torch's."""
    try:
        return make(attn_implementation="sdpa")
    except ValueError:
        return make(attn_implementation="eager")
