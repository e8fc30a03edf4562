"""Arithmetic of numerics profiles: the one that is a node's own, and how torch computes in it."""

from typing import NamedTuple, get_args

import torch

from farflung.protocol.errors import ConfigError
from farflung.protocol.messages import RunInfo
from farflung.protocol.numerics import Dtype, Numerics

BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "fp8": 8}
"""Of a weight, by arithmetic, where it is not quantised."""
QUANTISED = {"": 0, "int8": 8, "fp8": 8, "int4": 4}
"""The same by quantiser."""
HOLDS: dict[str, tuple[str, ...]] = {"llama.cpp": ("int4",)}
"""Quantisers of engines that hold nothing but what these made; others hold whatever they are given."""


AS_ASKED = ("torch", "mlx")
"""Engines of a node's own process, which compute in whichever arithmetic torch has too."""


class Own(NamedTuple):
    """What a node can say of its numerics before it picks a profile."""

    engine: str
    device: str
    """Empty for a server that does not say; so is the next."""
    arithmetic: str = ""
    """Empty as well for an engine that computes in whichever is asked."""
    bits: int = 0
    """Of a weight; 0 as well."""

    @property
    def text(self) -> str:
        """All of it in words."""
        end = f" in {self.arithmetic}" if self.arithmetic else ""
        return f"{self.engine} on {self.device or 'an unknown device'}{end}" + (
            f" with weights of {self.bits} bits" if self.bits else ""
        )

    def fits(self, numerics: Numerics) -> bool:
        """Whether this node computes, or can compute, so."""
        can = numerics.engine not in AS_ASKED or numerics.arithmetic in get_args(Dtype)
        can &= numerics.quantiser in HOLDS.get(self.engine, (numerics.quantiser,))
        bits = self.bits if numerics.quantiser else numerics.bits  # what is quantised is quantised before it gets there
        said = zip(self, (numerics.engine, numerics.device, numerics.arithmetic, bits), strict=True)
        return can and all(own in ("", 0, other) for own, other in said)

    @property
    def is_vague(self) -> bool:
        """Whether it may be other than the first profile that fits."""
        return self.engine not in AS_ASKED and not all(self)


def choose(info: RunInfo, own: Own, named: str = "") -> str:
    """The profile of a run that a node computes in: the one named, else the run's own or the first that fits.

    One with a quantiser is taken where it is named, or where there is no other.

    Raises ConfigError where that is not its own: judged by it, an honest node would be ejected.
    """
    if named and named not in info.profiles:
        raise ConfigError(f"this run admits no numerics profile {named!r}; choose one of {', '.join(info.profiles)}")
    fitting = [name for name, one in info.profiles.items() if own.fits(one)]
    whole = [name for name in fitting if not info.profiles[name].quantiser]
    fitting = fitting if named or not whole else whole
    fitting.sort(key=lambda name: name != info.profile)
    if named and named not in fitting:
        others = f"choose one of {', '.join(fitting)}, or " if fitting else ""
        raise ConfigError(
            f"numerics profile {named!r} is for {info.profiles[named].text}, and this node is {own.text}; "
            f"{others}{_how(own)}"
        )
    if not fitting:
        kinds = "; ".join(f"{name}: {one.text}" for name, one in info.profiles.items())
        raise ConfigError(f"this run admits no numerics profile for {own.text} ({kinds}); {_how(own)}")
    if not named and len(fitting) > 1 and own.is_vague:
        raise ConfigError(f"{own.text} may be any of {', '.join(fitting)}; name the right one with --profile")
    return named or fitting[0]


def _how(own: Own) -> str:
    device = (own.device or "cuda") + {"vllm": " --engine-url URL", "mlx": " --engine mlx"}.get(own.engine, "")
    if own.engine in HOLDS:
        device += f" --engine {own.engine} --quantiser {HOLDS[own.engine][0]}"
    return (
        f"compute on another --device, or measure this one: `farflung calibrate MODEL --device {device} "
        "--prompts RUN.toml --out FILE.json`, and have the run's operator name FILE.json in model.profiles"
    )


def dtype_of(numerics: Numerics) -> torch.dtype:
    """The type that torch computes in. Raises ConfigError for arithmetic that it cannot do."""
    if numerics.arithmetic not in get_args(Dtype):
        raise ConfigError(f"torch cannot compute in {numerics.arithmetic}; it can do {', '.join(get_args(Dtype))}")
    return getattr(torch, numerics.arithmetic)
