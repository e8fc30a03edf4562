"""Linear layers that are fast for the few rows of a decoding batch.

How a CPU's product of some rows with a weight (N, K) is asked decides how long it takes, for one of the two is first
copied into the order that suits the kernel. All products of a decoding step of SmolLM2, two threads, milliseconds:

    rows                          4    16    32    48    64
    `x @ W.T`, the usual way     67   130   145   164   122   copies the weight every time
    `(W @ x.T).T`                49    49    63    76   117   copies the rows
    packed for 64 rows           80    80    80    80    80   the weight was copied once

So a few rows take the second way, and a full batch the third while it decodes: packing pays after three tokens (0.11
s for SmolLM2), and a prefill of as many positions does not come again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

FEW_ROWS, FULL_ROWS = 40, 64
"""Up to `FEW_ROWS` rows the weight goes first; from there to `FULL_ROWS` it is packed for just `FULL_ROWS`."""
LEAST_WEIGHT = 1 << 16
"""Elements of a weight from which on it matters: to copy a smaller one takes less time than to do otherwise."""
MOST_PACKED = 1 << 29
"""Parameters of a model up to which weights are packed, for that takes their memory once more (2 GiB).

MKL asks for still more, 10 MB a weight, and never writes there; a process that keeps what it freed finds it full.
"""


def hasten(model: nn.Module) -> None:
    """Make a model's plain linear layers ask for products in the fastest way; same parameters, same names."""
    is_small = sum(parameter.numel() for parameter in model.parameters()) <= MOST_PACKED
    kind = _Packing if is_small and _can_pack() else _Linear
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.numel() >= LEAST_WEIGHT:
            module.__class__ = kind


def _can_pack() -> bool:
    """Whether this build of torch has the packed product, which it keeps for its own compiler."""
    return torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")


class _Linear(nn.Linear):
    """A linear layer that takes the weight first where rows are few, and copies the result into the usual order.

    What is left across the rows is slow for whoever comes next: torch's fast attention does not take it at all.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.numel() // self.in_features
        if not 1 < rows <= FULL_ROWS or input.device.type != "cpu" or input.dtype != torch.float32:
            return F.linear(input, self.weight, self.bias)
        x = input.reshape(rows, self.in_features)
        if rows <= FEW_ROWS:
            out = torch.mm(self.weight, x.t()).t().contiguous()
        elif input.dim() > 2 and input.shape[-2] == 1:  # it decodes: a token of each row, and more to come
            out = self._full(x)
        else:
            out = F.linear(x, self.weight)
        if self.bias is not None:
            out = out + self.bias
        return out.view(*input.shape[:-1], self.out_features)

    def _full(self, x: torch.Tensor) -> torch.Tensor:
        """The product for more than a few rows."""
        return F.linear(x, self.weight)


class _Packing(_Linear):
    """The same, with the weight packed at the first full batch after each load."""

    _packed: tuple[int, Any] = (-1, None)
    """The version of the weight that was packed, and what came of it."""

    def _full(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed[0] != self.weight._version:
            self._packed = -1, None  # so that the next one takes the same memory
            packed = torch.ops.mkl._mkl_reorder_linear_weight(self.weight, FULL_ROWS)
            self._packed = self.weight._version, packed
        padded = F.pad(x, (0, 0, 0, FULL_ROWS - len(x))) if len(x) < FULL_ROWS else x
        return torch.ops.mkl._mkl_linear(padded, self._packed[1], self.weight, None, FULL_ROWS)[: len(x)]
