"""Linear layers by oneDNN, with weights packed once for a batch that decodes.

`F.linear` gives float32 to a library that copies the weight at every call where rows are few, and that takes its slow
path on CPUs of other makers than its own. All products of a step of SmolLM2, two threads, milliseconds:

    rows                             1     5    16    40    64   360  1024
    AMD (Zen 5), `F.linear`         29    37    48    76   107   461  1237
    oneDNN, plain weight            18    23    28    39    52   211   584
    oneDNN, packed weight           15    15    19    32    48   199   535
    the same in bfloat16             7     8    11    18    26   105   282

Packing takes 0.1 to 0.2 s for SmolLM2 and the weights' memory once more, so a prefill, which comes once, does without.
Where a CPU or a build of torch lacks a product, layers ask for the usual one (see `can_multiply`).
"""

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

LEAST_WEIGHT = 1 << 16
"""Elements of a weight from which on it matters."""
MOST_PACKED = 1 << 29
"""Parameters of a model up to which weights are packed, for that takes their memory once more (2 GiB in float32)."""
_TYPES = (torch.float32, torch.bfloat16)


def optimise_linears(model: nn.Module) -> None:
    """Make a model's plain linear layers ask for products in the fastest way; same parameters, same names."""
    is_small = sum(parameter.numel() for parameter in model.parameters()) <= MOST_PACKED
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.numel() >= LEAST_WEIGHT:
            kind = _Packing if is_small and can_multiply(module.weight.dtype, is_packed=True) else _Linear
            if can_multiply(module.weight.dtype):
                module.__class__ = kind


@cache
def can_multiply(dtype: torch.dtype, *, is_packed: bool = False) -> bool:
    """Whether this CPU gives these products in a type, found by asking for one.

    torch keeps the operators for its own compiler, and has them also where oneDNN knows no such arithmetic: in bfloat16
    that takes AVX-512 or what came after it.
    """
    if dtype not in _TYPES or not torch.backends.mkldnn.is_available():
        return False
    size = math.isqrt(LEAST_WEIGHT)
    weight = torch.eye(size, dtype=dtype)
    rows = torch.arange(4.0 * size, dtype=torch.float32).view(4, 1, size).to(dtype)
    try:
        with torch.inference_mode():
            return torch.equal(_product(rows, _packed(weight, 4) if is_packed else weight, None), rows)
    except (RuntimeError, AttributeError, TypeError):  # not on this CPU; not in this torch, or not asked for like this
        return False


def _product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def _packed(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """A weight as oneDNN likes it best for so many rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


class _Linear(nn.Linear):
    """A linear layer by oneDNN, which gives no gradients: where they are asked for it is a plain one."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        is_ours = input.device.type == "cpu" and input.dtype == self.weight.dtype and can_multiply(input.dtype)
        if not is_ours or torch.is_grad_enabled():
            return F.linear(input, self.weight, self.bias)
        return _product(input, self._laid_out(input), self.bias)

    def _laid_out(self, _input: torch.Tensor) -> torch.Tensor:
        """The weight as oneDNN is to have it."""
        return self.weight


class _Packing(_Linear):
    """The same, with the weight packed when the first batch decodes after each load."""

    _packed: tuple[int, Any] = (-1, None)
    """The version of the weight that was packed, and what came of it."""

    def _laid_out(self, _input: torch.Tensor) -> torch.Tensor:
        version, packed = self._packed
        if version == self.weight._version:
            return packed
        self._packed = -1, None  # packed copies of other weights are let go first
        is_decoding = _input.dim() > 2 and _input.shape[-2] == 1  # a token of each row, and more to come
        if not is_decoding or not can_multiply(self.weight.dtype, is_packed=True):
            return self.weight
        packed = _packed(self.weight, len(_input))
        self._packed = self.weight._version, packed
        return packed
