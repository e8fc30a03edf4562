"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): W is frozen, and the model computes with W + scale · B A.

B begins at zero, so the first policy is the base model to the bit. A and B are all that the optimizer knows. Where they
travel alone (`is_alone`), W is what was published of it, for that is what others add them to.
"""

from collections.abc import Iterator

import torch
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from farflung.learner.straight_through import as_published
from farflung.numerics.merge import Factors, factors, merge
from farflung.numerics.rounding import dithered
from farflung.protocol.errors import ConfigError

_PART = "parametrizations.weight."


class Adapter(torch.nn.Module):
    """The adapter added to one matrix of shape (out, in)."""

    def __init__(self, weight: torch.Tensor, rank: int, scale: float, *, is_rounded: bool = False) -> None:
        super().__init__()
        self.scale, self.is_rounded = scale, is_rounded
        self.A = torch.nn.Parameter(torch.randn(rank, weight.shape[1]).to(weight.device) / weight.shape[1] ** 0.5)
        self.B = torch.nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The matrix with its adapter; under autocast as it is published, if so asked (see `mixed.py`)."""
        found = weight + self.scale * (self.B @ self.A)
        is_mixed = self.is_rounded and torch.is_autocast_enabled(weight.device.type)
        return as_published(found) if is_mixed else found


@torch.no_grad()
def adapt(model: PreTrainedModel, rank: int, scale: float, *, is_alone: bool = False, is_rounded: bool = False) -> None:
    """Freeze a model, in place, but for an adapter on every linear layer other than its output head.

    Raises ConfigError where there is no such layer.
    """
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if type(m) is torch.nn.Linear and m is not head]
    if not linears:
        raise ConfigError(f"learn.lora_rank = {rank}: a {type(model).__name__} has no linear layers to adapt")
    model.requires_grad_(requires_grad=False)
    for linear in linears:
        if is_alone:
            linear.weight.copy_(dithered(linear.weight)).add_(0.0)  # no −0.0, which no sum comes to
        parametrize.register_parametrization(
            linear, "weight", Adapter(linear.weight, rank, scale, is_rounded=is_rounded)
        )


@torch.no_grad()
def merged(model: PreTrainedModel, name: str) -> torch.Tensor:
    """A weight by the name that it had before, with its adapter in it."""
    module, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(module), leaf).detach()


@torch.no_grad()
def base(model: PreTrainedModel, name: str) -> torch.Tensor:
    """A matrix without its adapter as it was published, bfloat16."""
    return _layer(model, name).parametrizations["weight"].original.bfloat16()


@torch.no_grad()
def factors_of(model: PreTrainedModel, name: str) -> Factors:
    """A matrix's adapter as it is published. Raises WeightsError where it is not finite."""
    adapter = _layer(model, name).parametrizations["weight"][0]
    return factors(name, adapter.B, adapter.A, adapter.scale)


def published(model: PreTrainedModel, name: str) -> torch.Tensor:
    """A matrix merged with its adapter, as nodes that fetch both merge them, bfloat16. Raises WeightsError."""
    return merge(base(model, name), factors_of(model, name))


def _layer(model: PreTrainedModel, name: str) -> torch.nn.Module:
    return model.get_submodule(name.removesuffix(".weight"))


def adapters(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of every A and B; none of a model that is not adapted."""
    return ((name, parameter) for name, parameter in model.named_parameters() if f"{_PART}0." in name)
