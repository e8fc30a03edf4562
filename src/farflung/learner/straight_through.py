"""Arithmetic in bfloat16 over float32 masters, with each weight as it is published.

Autocast rounds masters to nearest, so for the first steps of 1e-5 it computes with the base model while what is
published moves on (`numerics/rounding.py`): gradients are those of weights that no worker generates with, and several
updates of one step all go the same way. Here linear layers and embeddings take the published roundings, made once for
every change of the masters, and gradients go to the masters as if nothing had been rounded (straight through, Bengio et
al. 2013).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from farflung.numerics.rounding import dithered


def compute_as_published(model: PreTrainedModel) -> None:
    """Make a model's linear layers and embeddings do so under autocast; same parameters, same names."""
    roundings = _Roundings()
    for module in model.modules():
        kind = _KINDS.get(type(module))
        if kind is not None:
            module.__class__, module._roundings = kind, roundings


def rounding_of(module: nn.Module) -> torch.Tensor | None:
    """A module's weight as it is computed with, without gradient; none where autocast does as always."""
    return module._roundings.of(module.weight) if type(module) in _KINDS.values() else None


class _Roundings:
    """By parameter, what it was rounded to and at which version of it. Tied layers have one."""

    def __init__(self) -> None:
        self._held: dict[nn.Parameter, tuple[int, torch.Tensor]] = {}

    def of(self, master: nn.Parameter) -> torch.Tensor:
        version, found = self._held.get(master, (-1, None))
        if found is None or version != master._version:
            found = dithered(master.detach())
            self._held[master] = master._version, found
        return found


class _Rounded(torch.autograd.Function):
    """The rounding, whose gradient is the master's."""

    @staticmethod
    def forward(ctx: Any, master: torch.Tensor, rounding: torch.Tensor) -> torch.Tensor:
        return rounding.view_as(rounding)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0].float(), None


class _Linear(nn.Linear):
    _roundings: _Roundings

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        return F.linear(input, _Rounded.apply(self.weight, self._roundings.of(self.weight)), self.bias)


class _Embedding(nn.Embedding):
    _roundings: _Roundings

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        found = super().forward(input)
        if not torch.is_autocast_enabled(input.device.type):
            return found
        return found + (F.embedding(input, self._roundings.of(self.weight)) - found).detach()


_KINDS: dict[type, type] = {nn.Linear: _Linear, nn.Embedding: _Embedding}
