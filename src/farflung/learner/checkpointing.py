"""Checkpointed activations without training mode: transformers has one only with the other, and with it dropout.

A policy that drops out is not the one that generated: the ratio of the first update would not be 1.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_calmly(model: PreTrainedModel) -> None:
    """Checkpoint the layers of a model in evaluation mode: they alone hear that it trains, and only between passes."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True
            layer._gradient_checkpointing_func = _Calm(layer)


class _Calm:
    """The function that a layer calls to have its pass checkpointed."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __call__(self, run: Callable[..., Any], *args: torch.Tensor) -> Any:
        return checkpoint(self._run, run, *args, use_reentrant=False)

    def _run(self, run: Callable[..., Any], *args: torch.Tensor) -> Any:
        self._layer.training = False
        try:
            return run(*args)
        finally:
            self._layer.training = True
