"""Numerics of a node: what computes, on which kind of device, in which arithmetic. A profile is for one of these."""

from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct

NOISE: Final = "vllm-murmur3"
"""The noise of every run (`engine/noise.py`), sealed in its descriptor: a node that has another does not start.

One for a run, never one for each node: two nodes with two noises could choose between two texts of a sample."""

Dtype = Literal["float32", "bfloat16", "float16"]
"""What a verifier can compute in."""
Verifiers = Annotated[tuple[Dtype, ...], Meta(min_length=1, max_length=3)]
"""Arithmetics of a verifier, the one to take first in front."""
DeviceKind = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9]{0,15}(?!\n)$")]
"""As torch calls it, whatever computes there: cpu, cuda, xpu, mps."""


EngineKind = Literal["torch", "vllm", "mlx", "llama.cpp"]
"""What generates."""
Quantiser = Literal["", "int8", "fp8", "int4"]
"""What published weights go through before a node computes with them (`numerics/quantise.py`); empty for nothing."""
COARSER: Final[dict[Quantiser, tuple[Quantiser, ...]]] = {
    "": ("int8", "int4"),
    "int8": ("int4",),
    "fp8": ("int4",),
    "int4": (),
}
"""What saves more than each: a node that declares one could gain by another."""


class Numerics(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What generates, on which kind of device, in which arithmetic, with weights of how many bits."""

    engine: EngineKind
    device: DeviceKind
    arithmetic: Literal["float32", "bfloat16", "float16", "fp8"]
    bits: Annotated[int, Meta(ge=2, le=32)]
    """Of a weight in its matrices."""
    quantiser: Quantiser = ""
    """What made them of the published ones, for the verifier to do the same; empty for none, or an engine's own."""

    @property
    def fields(self) -> dict[str, Any]:
        """These four by name, whatever else a subclass has."""
        return {name: getattr(self, name) for name in Numerics.__struct_fields__}

    @property
    def text(self) -> str:
        """All of it in words."""
        by = f" by {self.quantiser}" if self.quantiser else ""
        return f"{self.engine} on {self.device} in {self.arithmetic} with weights of {self.bits} bits{by}"
