"""Arithmetic by the name of a numerics profile: `torch-cpu-int8` computes in float32 with int8 weights."""

from collections.abc import Iterable, Iterator

import torch

from farflung.protocol.errors import ConfigError

ARITHMETIC: dict[str, tuple[torch.dtype, int]] = {
    "fp32": (torch.float32, 0),
    "bf16": (torch.bfloat16, 0),
    "int8": (torch.float32, 8),
}
"""Last part of a profile's name → (type that it computes in, bits that its weights are rounded to, 0 for none)."""


def arithmetic(profile: str) -> tuple[torch.dtype, int]:
    """The embedded engine's arithmetic for a profile. Raises ConfigError for one that it cannot do."""
    kind = profile.rpartition("-")[2]
    if kind not in ARITHMETIC:
        raise ConfigError(f"this engine cannot compute as profile {profile!r}; it can do {', '.join(ARITHMETIC)}")
    return ARITHMETIC[kind]


def rounded(tensors: Iterable[tuple[str, torch.Tensor]], bits: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Matrices rounded to signed integers of so many bits with one scale a row, given back as float32.

    Embeddings and everything that is no matrix stay as they are, as usual.
    """
    for name, tensor in tensors:
        yield name, _round(tensor.float(), bits) if bits and tensor.ndim == 2 and "embed" not in name else tensor


def _round(weight_RC: torch.Tensor, bits: int) -> torch.Tensor:
    scale_R1 = weight_RC.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
    return (weight_RC / scale_R1).round_().mul_(scale_R1)
