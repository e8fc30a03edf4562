"""Linear layers by oneDNN, with weights packed once for a batch that decodes.

`F.linear` gives float32 to a library that copies the weight at every call where rows are few, and that takes its slow
path on CPUs of other makers than its own. All products of a step of SmolLM2, two threads, milliseconds:

    rows                             1     5    16    40    64   360  1024
    AMD (Zen 5), `F.linear`         29    37    48    76   107   461  1237
    oneDNN, plain weight            18    23    28    39    52   211   584
    oneDNN, packed weight           15    15    19    32    48   199   535
    the same in bfloat16             7     8    11    18    26   105   282

Packing takes 0.1 to 0.2 s for SmolLM2 and the weights' memory once more, so a prefill, which comes once, does without.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

LEAST_WEIGHT = 1 << 16
"""Elements of a weight from which on it matters."""
MOST_PACKED = 1 << 29
"""Parameters of a model up to which weights are packed, for that takes their memory once more (2 GiB in float32)."""
_TYPES = (torch.float32, torch.bfloat16)


def hasten(model: nn.Module) -> None:
    """Make a model's plain linear layers ask for products in the fastest way; same parameters, same names."""
    if not _has_onednn():
        return
    is_small = sum(parameter.numel() for parameter in model.parameters()) <= MOST_PACKED
    kind = _Packing if is_small else _Linear
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.numel() >= LEAST_WEIGHT:
            module.__class__ = kind


def _has_onednn() -> bool:
    """Whether this build of torch has these products, which it keeps for its own compiler."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


class _Linear(nn.Linear):
    """A linear layer by oneDNN, which gives no gradients: where they are asked for it is a plain one."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        is_ours = input.device.type == "cpu" and input.dtype == self.weight.dtype and input.dtype in _TYPES
        if not is_ours or torch.is_grad_enabled():
            return F.linear(input, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(input, self._laid_out(input), self.bias, "none", [], "")

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
        self._packed = -1, None  # what was packed of other weights is let go first
        is_decoding = _input.dim() > 2 and _input.shape[-2] == 1  # a token of each row, and more to come
        if not is_decoding:
            return self.weight
        packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, len(_input))
        self._packed = self.weight._version, packed
        return packed
