"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): W is frozen, and the model computes with W + scale · B A.

B begins at zero, so the first policy is the base model to the bit. A and B are all that the optimizer knows. All else
is as it was published of the base model, in the type of the arithmetic, for that is what others add A and B to.

In bfloat16 each matrix is computed with exactly as it is published, merged anew for every pass, while gradients of A
and B are taken through their product: neither a float32 copy of the matrix nor its gradient ever exists.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from farflung.learner.ranks import like, local, own_rows, whole
from farflung.numerics.merge import Factors, factors, merge, merged
from farflung.numerics.rounding import publishable
from farflung.protocol.errors import ConfigError


class LoraLinear(nn.Linear):
    """A linear layer of shape (out, in) with an adapter; `lora_A` is (rank, in), `lora_B` (out, rank), both float32."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float
    is_held: bool
    """Whether the merged matrix stays until A or B changes: memory for time, where memory is plenty."""
    _held: tuple[tuple[int, int], torch.Tensor] | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype == torch.bfloat16:
            held = self.held() if self.is_held else None
            low = input.to(torch.bfloat16)
            return _Merged.apply(low, self.weight, self.lora_A, self.lora_B, self.bias, self.scale, held)
        return super().forward(input) + self.scale * F.linear(F.linear(input, self.lora_A), self.lora_B)

    @torch.no_grad()
    def held(self) -> torch.Tensor:
        """The matrix as it is published."""
        versions = self.lora_A._version, self.lora_B._version
        if self._held is None or self._held[0] != versions:
            self._held = versions, merged(self.weight, self.lora_B, self.lora_A, self.scale)
        return self._held[1]


class _Merged(torch.autograd.Function):
    """A layer with its adapter merged as published; the rounding counts as none backwards."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
        held: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight, A, B)
        ctx.scale, ctx.held = scale, held
        return F.linear(input, merged(weight, B, A, scale) if held is None else held, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight, A, B = ctx.saved_tensors
        whole_OI = merged(weight, B, A, ctx.scale) if ctx.held is None else ctx.held
        of_out, flat = grads[0].flatten(0, -2), input.flatten(0, -2)
        of_B = (of_out.t() @ (flat @ A.to(flat.dtype).t())).float() * ctx.scale
        of_A = ((of_out @ B.to(flat.dtype)).t() @ flat).float() * ctx.scale
        return grads[0] @ whole_OI, None, of_A, of_B, None, None, None


@torch.no_grad()
def adapt(
    model: PreTrainedModel,
    rank: int,
    scale: float,
    dtype: torch.dtype,
    *,
    is_empty: bool = False,
    is_held: bool = False,
) -> None:
    """Freeze a model, in place, but for an adapter on every linear layer other than its output head.

    Weights become what is published of them, in `dtype`; those of an `is_empty` model are still to come. Raises
    ConfigError where there is no such layer.
    """
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if type(m) is nn.Linear and m is not head]
    if not linears:
        raise ConfigError(f"learn.lora_rank = {rank}: a {type(model).__name__} has no linear layers to adapt")
    model.requires_grad_(requires_grad=False)
    _replace(model, partial(torch.empty_like if is_empty else frozen, dtype=dtype))
    for linear in linears:
        _adapt(linear, rank, scale, is_held=is_held)


def _replace(model: PreTrainedModel, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put other values, without gradients, in the place of every parameter; tied ones stay tied."""
    made = {one: nn.Parameter(change(one.detach()), requires_grad=False) for one in model.parameters()}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, made[parameter])


def frozen(values: torch.Tensor, start: int = 0, *, dtype: torch.dtype) -> torch.Tensor:
    """A weight, or what follows `start` values of it, as it is published, in `dtype`."""
    if not values.is_floating_point():
        return values
    return publishable(values.float(), start, is_dithered=True).to(dtype).add_(0.0)  # no −0.0, which no sum comes to


def _adapt(linear: nn.Linear, rank: int, scale: float, *, is_held: bool) -> None:
    height, width = linear.weight.shape
    linear.__class__ = LoraLinear
    assert isinstance(linear, LoraLinear)
    linear.lora_A = nn.Parameter((torch.randn(rank, width) / width**0.5).to(linear.weight.device))
    linear.lora_B = nn.Parameter(torch.zeros(height, rank, device=linear.weight.device))
    linear.scale, linear.is_held, linear._held = scale, is_held, None


def layer_of(model: PreTrainedModel, name: str) -> LoraLinear | None:
    """The layer that has a weight with an adapter."""
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    return layer if leaf == "weight" and isinstance(layer, LoraLinear) else None


@torch.no_grad()
def factors_of(layer: LoraLinear, name: str) -> Factors:
    """A layer's adapter as it is published; every rank must ask. Raises WeightsError where it is not finite."""
    return factors(name, whole(layer.lora_B), whole(layer.lora_A), layer.scale)


@torch.no_grad()
def published(layer: LoraLinear, name: str) -> torch.Tensor:
    """A matrix merged with its adapter, as nodes that fetch both merge them, bfloat16, sharded as the layer is.

    Raises WeightsError.
    """
    weight, (start, stop) = layer.weight.detach(), own_rows(layer.weight)
    found = factors_of(layer, name)
    own = Factors(name, found.exponent, found.B[start:stop], found.A)
    return like(merge(local(weight).bfloat16(), own, start * weight.shape[1]), weight)


def adapters(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of every A and B; none of a model that is not adapted."""
    return ((name, one) for name, one in model.named_parameters() if name.rpartition(".")[2] in ("lora_A", "lora_B"))
