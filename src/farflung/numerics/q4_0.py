"""Matrices of the canonical quantiser int4 in the blocks that GGUF calls Q4_0: 4.5 bits a value instead of 16.

A block is 32 values of a row in 18 bytes: d in float16, then a byte for each of 16 pairs, value i below value i + 16,
each as q + 8. The canonical values are q·d rounded to bfloat16, and d is not among them; it is found again: q follows
from the value that is largest (its q is -8), then any d that rounds to all 32 values will do. What fits no d was not
made by that quantiser.

Legend: R rows, C columns, G blocks.
"""

from typing import Final

import numpy as np
import torch

from farflung.protocol.errors import WeightsError

BLOCK: Final = 32
"""Values of a block; a row must hold whole ones."""
BLOCK_BYTES: Final = 18
_STEPS: Final = (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6)
"""From the first guess of d, in the last place of float16: bfloat16 has 8 bits of d, float16 11, so 4 either way."""


def packed(weight_RC: torch.Tensor, name: str = "a matrix") -> np.ndarray:
    """The blocks of a matrix, uint8 (R, C / 32 * 18). Raises WeightsError for one that int4 did not make."""
    group_G32 = weight_RC.detach().cpu().bfloat16().float().reshape(-1, BLOCK)
    whole_G32 = _whole(group_G32)
    scale_G = _scales(group_G32, whole_G32)
    if scale_G is None:
        raise WeightsError(
            f"{name} holds values that the quantiser int4 does not make; quantise the weights by it first"
        )
    nibble_G32 = (whole_G32 + 8).to(torch.uint8)
    pair_G16 = nibble_G32[:, :16] | nibble_G32[:, 16:] << 4
    block_GB = torch.cat([scale_G.view(torch.uint8).view(-1, 2), pair_G16], dim=1)
    return block_GB.view(len(weight_RC), -1).numpy()


def unpacked(block_RB: np.ndarray) -> torch.Tensor:
    """The canonical values of such blocks, bfloat16 (R, C)."""
    block_GB = torch.from_numpy(block_RB).reshape(-1, BLOCK_BYTES)
    scale_G1, pair_G16 = block_GB[:, :2].contiguous().view(torch.float16).float(), block_GB[:, 2:]
    whole_G32 = torch.cat([pair_G16 & 15, pair_G16 >> 4], dim=1).float() - 8
    return (whole_G32 * scale_G1).bfloat16().view(len(block_RB), -1)


def _whole(group_G32: torch.Tensor) -> torch.Tensor:
    """The q of each value, between -8 and 7."""
    largest_G1 = group_G32.gather(1, group_G32.abs().argmax(dim=1, keepdim=True))
    inverse_G1 = torch.where(largest_G1 == 0, 0.0, -8 / largest_G1)
    return (group_G32 * inverse_G1).round_().clamp_(-8, 7)


def _scales(group_G32: torch.Tensor, whole_G32: torch.Tensor) -> torch.Tensor | None:
    """A d for each block, float16 (G,), with which q·d rounds to all of its values; None where a block has none."""
    squares_G = whole_G32.square().sum(1).clamp_(min=1)
    scale_G = ((group_G32 * whole_G32).sum(1) / squares_G).half().view(torch.int16)
    left_N = torch.arange(len(scale_G))
    for step in _STEPS:
        tried_N = (scale_G[left_N] + step).view(torch.float16)
        product = (whole_G32[left_N] * tried_N.float()[:, None]).bfloat16().float()
        fits_N = (product == group_G32[left_N]).all(dim=1)
        scale_G[left_N[fits_N]] = tried_N[fits_N].view(torch.int16)
        left_N = left_N[~fits_N]
        if not len(left_N):
            return scale_G
    return None
