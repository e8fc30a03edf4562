"""A matrix with its adapter in it, to the same bits on every machine: trainer, worker and validator merge alike.

B (out, rank) and A (rank, in) travel as whole numbers of 16 bits and one power of two. A product of two is 2^30 at most
and a sum of up to 4,096 is 2^42, all of them whole: float64 holds each without rounding, so it does not matter in which
order, in what blocks or with what instructions a matrix product adds them. Roundings come after, value
by value: the sum with the base in float64, that in float32, and its threshold (`dither`) to bfloat16.
"""

import math
from dataclasses import dataclass

import torch

from farflung.numerics.devices import blocks
from farflung.numerics.rounding import dithered
from farflung.protocol.errors import WeightsError

BITS = 15
"""Of a whole number, beside its sign."""
SMALLEST_EXPONENT = -150
"""Of one factor: 2^-300 times a whole number is far from what float64 rounds to nothing."""
_EXPONENT_BITS = 0x7F80
_BIAS, _MANTISSA_BITS = 1023, 52
"""Of a float64's exponent, and how far from its last bit that lies."""


@dataclass(frozen=True, slots=True)
class Factors:
    """The adapter added to one matrix: 2^exponent · B A, of int16."""

    name: str
    exponent: int
    B: torch.Tensor
    A: torch.Tensor


def factors(name: str, B: torch.Tensor, A: torch.Tensor, scale: float) -> Factors:
    """An adapter of floats as whole numbers, each within 2^-15 of its factor's largest. Raises WeightsError."""
    B, A = (one.detach().cpu() if one.device.type == "mps" else one.detach() for one in (B, A))
    whole_B, exponent_B = _whole(name, B.double() * scale)
    whole_A, exponent_A = _whole(name, A.double())
    return Factors(name, exponent_B + exponent_A, whole_B, whole_A)


def merge(base: torch.Tensor, adapter: Factors, start: int = 0) -> torch.Tensor:
    """bfloat16 (out, in) of the base (out, in) in bfloat16 and its adapter. Raises WeightsError if it overflows.

    Of rows that are not the first, `start` is how many values come before them.
    """
    if base.device.type == "mps":  # which has no float64
        return merge(base.cpu(), adapter, start).to(base.device)
    found = _add(base, adapter.B, adapter.A.double() * 2.0**adapter.exponent, start)
    if ((found.view(torch.int16) & _EXPONENT_BITS) == _EXPONENT_BITS).any():
        raise WeightsError(f"tensor {adapter.name} with its adapter holds infinities or NaNs; they cannot be published")
    return found


def merged(base: torch.Tensor, B: torch.Tensor, A: torch.Tensor, scale: float) -> torch.Tensor:
    """What `merge` makes of a base and the `factors` of an adapter, without a wait for the device, and unchecked."""
    if base.device.type == "mps":
        return merged(base.cpu(), B.cpu(), A.cpu(), scale).to(base.device)
    return _add(base, _quantised(B.double() * scale), _quantised(A.double()), 0)


def _add(base: torch.Tensor, B: torch.Tensor, A: torch.Tensor, start: int) -> torch.Tensor:
    """Some rows at a time, for they are float64 on the way."""
    height, width = base.shape
    found, rows = torch.empty_like(base), max(1, blocks(base.device).merged // max(1, width))
    for top in range(0, height, rows):
        part = slice(top, top + rows)
        total = B[part].double() @ A
        found[part] = dithered(total.add_(base[part].double()).float(), start + top * width)
    return found


def _quantised(values: torch.Tensor) -> torch.Tensor:
    """float64 values as they are once they were whole numbers and a power of two, which is made of its own bits."""
    exponent = (torch.frexp(values.abs().max()).exponent.long() - BITS).clamp_min(SMALLEST_EXPONENT)
    power = ((exponent + _BIAS) << _MANTISSA_BITS).view(torch.float64)
    return (values / power).round_().clamp_(-(2**BITS), 2**BITS - 1) * power


def _whole(name: str, values: torch.Tensor) -> tuple[torch.Tensor, int]:
    most = float(values.abs().max()) if values.numel() else 0.0
    if not most <= torch.finfo(torch.float32).max:
        raise WeightsError(
            f"the adapter of {name} holds infinities or NaNs; lower learn.lr and go on from an earlier checkpoint"
        )
    exponent = max(SMALLEST_EXPONENT, math.frexp(most)[1] - BITS)
    whole = (values * 2.0**-exponent).round_().clamp_(-(2**BITS), 2**BITS - 1)
    return whole.to(torch.int16), exponent
