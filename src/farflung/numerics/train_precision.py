"""The default arithmetic of training: bfloat16 where the machine has it, else float32.

Emulated bfloat16 is no shortcut: on a CPU without it a linear layer takes five to ten times as long as in float32. The
answer depends on the machine alone and not on a stopwatch, so a resumed trainer computes as it did before.
"""

from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]
_NATIVE = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Torch's names for bfloat16 arithmetic in CPUs."""


def compute_dtype(precision: Precision, device: torch.device | str = "cpu") -> tuple[torch.dtype, str]:
    """The type of the arithmetic, and in one line why."""
    if precision != "auto":
        return getattr(torch, precision), f"learn.precision = {precision!r}"
    kind = torch.device(device).type
    if kind == "cpu":
        capabilities = torch.cpu.get_capabilities()
        has_it = any(capabilities.get(name) for name in _NATIVE)
    else:
        has_it = kind != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if has_it:
        return torch.bfloat16, f"{kind} computes in bfloat16; master weights stay float32"
    return torch.float32, f"{kind} only emulates bfloat16, which is several times slower than float32"
