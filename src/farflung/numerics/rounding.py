"""Rounds float32 masters to bfloat16 so that small updates show at once, on average over the weights.

Masters that start from a bfloat16 model lie on its grid, and an update of 1e-5 is a small part of its spacing (2.4e-4
for weights of 0.03 to 0.06): rounded to nearest, hardly a weight of what is published moves for the first ten steps,
while the policy in training moves on. Here every weight has a threshold of its own between two neighbours, the same in
every step: the share of weights that have crossed theirs is the share of the way that the masters have gone. A value on
the grid stays as it is, and nothing flickers: published weights are a pure function of the masters.
"""

from functools import lru_cache

import torch

_PERIOD = 1 << 16
_STRIDE = 40_503
"""Odd, near 2^16 over the golden ratio: any run of its multiples modulo 2^16 is spread evenly."""


def publishable(tensor: torch.Tensor, start: int = 0, *, is_dithered: bool) -> torch.Tensor:
    """A master as it is published, or what follows `start` values of it: floats in bfloat16, anything else as it is."""
    if not tensor.is_floating_point():
        return tensor.clone()
    return dithered(tensor, start) if is_dithered and tensor.dtype == torch.float32 else tensor.to(torch.bfloat16)


def dithered(tensor: torch.Tensor, start: int = 0) -> torch.Tensor:
    """float32 to bfloat16, each value to one of its two neighbours, up as often as it lies near the upper one.

    Of a part of a tensor `start` is how many values come before it.
    """
    bits = tensor.contiguous().view(torch.int32).flatten()
    found = torch.empty(bits.shape, dtype=torch.int16, device=bits.device)
    table, whole = _table(str(bits.device)).roll(-start % _PERIOD), len(bits) // _PERIOD * _PERIOD
    found[:whole] = ((bits[:whole].view(-1, _PERIOD) + table) >> 16).flatten()
    found[whole:] = (bits[whole:] + table[: len(bits) - whole]) >> 16
    return found.view(torch.bfloat16).view(tensor.shape)


@lru_cache(maxsize=4)
def _table(device: str) -> torch.Tensor:
    """Thresholds from 0 to 2^16 - 1, each once: added to the bits that bfloat16 drops, they decide the carry."""
    return ((torch.arange(_PERIOD, dtype=torch.int64) * _STRIDE) % _PERIOD).to(torch.int32).to(device)
