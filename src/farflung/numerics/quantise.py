"""Canonical quantisers: published weights with fewer bits, the same values on every machine.

A node whose profile names one computes with what it makes of the published weights, and validators and trainer do the
same to their copy before they replay its text; so an honest node of few bits looks honest, one of still fewer does not.
Matrices are quantised along their rows (output channels); embeddings, the output head and everything that is no matrix
stay as they are. Each value is q·scale in float32, rounded to bfloat16, so that every engine can hold it.

    int8   a row: scale = max|w| / 127, q = w / scale rounded to even, between -127 and 127
    fp8    a row: scale = max|w| / 448, q = w / scale as e4m3 (no infinities), rounded to even
    int4   32 values of a row, as GGUF has them in Q4_0: d = (the value with the largest |w|) / -8 in float16,
           q = trunc(w / d + 8.5) - 8 with d still in float32, between -8 and 7; a row's last group may be shorter

All of it is float32 arithmetic on the CPU, where each operation is rounded once (IEEE 754), whatever the device.
"""

from collections.abc import Callable, Iterable, Iterator

import torch

from farflung.protocol.numerics import Quantiser

_GROUP = 32
_SMALLEST = 1e-30
"""Of a scale, so that rows of zeros stay zeros."""


def quantised(tensors: Iterable[tuple[str, torch.Tensor]], quantiser: Quantiser) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors, the matrices among them quantised; with no quantiser as they are."""
    for name, tensor in tensors:
        is_taken = quantiser and is_quantised(name, tensor)
        yield name, quantise(tensor, quantiser) if is_taken else tensor


def is_quantised(name: str, tensor: torch.Tensor) -> bool:
    """Whether a quantiser takes a tensor of this name."""
    return tensor.ndim > 1 and "embed" not in name and "lm_head" not in name


def quantise(weight: torch.Tensor, quantiser: Quantiser) -> torch.Tensor:
    """A matrix, or several (..., R, C), in bfloat16 on the CPU. Raises ValueError for weights that are not finite."""
    flat_RC = weight.detach().cpu().float().reshape(-1, weight.shape[-1])
    if not flat_RC.isfinite().all():
        raise ValueError("weights that are not finite cannot be quantised")
    return _QUANTISERS[quantiser](flat_RC).bfloat16().view(weight.shape)


def _int8(weight_RC: torch.Tensor) -> torch.Tensor:
    scale_R1 = _scale(weight_RC, 127)
    return (weight_RC / scale_R1).round_().clamp_(-127, 127).mul_(scale_R1)


def _fp8(weight_RC: torch.Tensor) -> torch.Tensor:
    scale_R1 = _scale(weight_RC, 448)
    return (weight_RC / scale_R1).clamp_(-448, 448).to(torch.float8_e4m3fn).float().mul_(scale_R1)


def _scale(weight_RC: torch.Tensor, largest: int) -> torch.Tensor:
    return (weight_RC.abs().amax(dim=1, keepdim=True) / largest).clamp_min_(_SMALLEST)


def _int4(weight_RC: torch.Tensor) -> torch.Tensor:
    rows, columns = weight_RC.shape
    short = -columns % _GROUP
    group_G32 = torch.nn.functional.pad(weight_RC, (0, short)).view(-1, _GROUP)
    place_G1 = group_G32.abs().argmax(dim=1, keepdim=True)
    step_G1 = group_G32.gather(1, place_G1) / -8
    inverse_G1 = torch.where(step_G1 == 0, 0.0, 1 / step_G1)
    whole_G32 = (group_G32 * inverse_G1 + 8.5).trunc_().clamp_(0, 15) - 8
    return (whole_G32 * step_G1.half().float()).view(rows, -1)[:, :columns].contiguous()


_QUANTISERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"int8": _int8, "fp8": _fp8, "int4": _int4}
