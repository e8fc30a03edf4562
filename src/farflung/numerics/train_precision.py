"""The default arithmetic of training: bfloat16 where the machine has it, else float32.

Emulated bfloat16 is no shortcut: on a CPU without it a linear layer takes five to ten times as long as in float32. The
answer depends on the machine alone and not on a stopwatch, so a resumed trainer computes as it did before.
"""

from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]
_NATIVE = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Torch's names for bfloat16 arithmetic in CPUs."""


def compute_dtype(precision: Precision, device: str = "cpu") -> tuple[torch.dtype, str]:
    """The type of the arithmetic, and in one line why."""
    if precision != "auto":
        return getattr(torch, precision), f"learn.precision = {precision!r}"
    if torch.device(device).type == "cuda":
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        has_it = any(capabilities.get(name) for name in _NATIVE)
    if has_it:
        return torch.bfloat16, "this machine computes in bfloat16; masters stay float32"
    return torch.float32, "this machine only emulates bfloat16, which is several times slower than float32"
