"""Devices: the one that a setting names, what a machine has, and how much to do at once on each kind."""

import logging
import platform
from collections.abc import Iterator
from typing import NamedTuple

import psutil
import torch

from farflung.numerics.train_precision import compute_dtype
from farflung.protocol.errors import ConfigError

log = logging.getLogger(__name__)
BACKENDS = ("cuda", "xpu", "mps")
"""The kinds of accelerator that `auto` looks for, as torch calls them, the fastest first."""


class Blocks(NamedTuple):
    """How many values are made at once where all of them would take too much memory, or miss the caches."""

    noise: int
    """Of the noise: hashed in one go."""
    scores: int
    """Of scores with noise in a replay, float32."""
    logits: int
    """Of logits of one prefill in a replay, in the model's type."""
    head_logits: int
    """Of logits that the learner takes from its output head at once, float32."""
    merged: int
    """Of a matrix that takes its adapter, float64."""


_OF_CPU = Blocks(noise=1 << 18, scores=1 << 20, logits=1 << 26, head_logits=1 << 23, merged=1 << 18)
"""As many as stay in or near a processor's caches: to hash 64 x 49,152 at once takes twice as long. In small blocks
threads wait for each other (to choose takes two cores 10.1, 7.7 and 7.2 ms with 2^17, 2^18 and 2^19)."""
_OF_ACCELERATOR = Blocks(noise=1 << 26, scores=1 << 26, logits=1 << 28, head_logits=1 << 27, merged=1 << 24)
"""A kernel takes as long to start as to work through a million values, and seven buffers of scores are there at once:
so 256 MiB each, which holds a decoding step of 256 rows of 152,064 and which a card of 12 GB can spare."""
OF_PROCESSOR, OF_ACCELERATOR = 0.5, 0.9
"""Share of a machine's memory, and of what is free on an accelerator, that a node takes at most by default."""


def blocks(device: torch.device | str) -> Blocks:
    """The sizes for one kind of device."""
    return _OF_CPU if torch.device(device).type == "cpu" else _OF_ACCELERATOR


def pick(setting: str, index: int | None = None) -> torch.device:
    """The device that a setting names: `auto` is the best there is, `index` the one of several that is meant.

    Raises ConfigError for one that this machine, or this build of torch, has not.
    """
    kind = best() if setting == "auto" else setting
    try:
        device = torch.device(kind)
        is_there = device.type == "cpu" or torch.get_device_module(device).is_available()
    except (RuntimeError, AttributeError) as error:
        raise ConfigError(f"torch knows no device {setting!r}; choose auto, cpu, cuda, cuda:N, mps or xpu") from error
    if not is_there:
        raise ConfigError(f"device {setting!r} is not there: torch {torch.__version__} finds {', '.join(present())}")
    if device.type == "cpu" or device.type == "mps":
        return torch.device(device.type)
    number = device.index if device.index is not None else (index or 0)
    count = torch.get_device_module(device).device_count()
    if number >= count:
        raise ConfigError(f"device {setting!r} is not there: of {device.type} this machine has {count}, counted from 0")
    return torch.device(device.type, number)


def best() -> str:
    """The kind of the fastest device here."""
    return next(_accelerators(), "cpu")


def present() -> list[str]:
    """The devices of this machine by the names that a setting may give them."""
    counts = {kind: torch.get_device_module(kind).device_count() for kind in _accelerators()}
    return ["cpu", *(f"{kind}:{n}" for kind, count in counts.items() for n in range(count))]


def _accelerators() -> Iterator[str]:
    """The kinds of accelerator here, the fastest first."""
    return (kind for kind in BACKENDS if torch.get_device_module(kind).is_available())


class Accelerator(NamedTuple):
    """A device as people know it."""

    name: str
    memory_bytes: int
    driver: str
    precision: str


def accelerator(device: torch.device) -> Accelerator:
    """A device with its driver and precision; of a processor only the precision."""
    return Accelerator(*_named(device), _driver(device), name_of(compute_dtype("auto", device)[0]))


def name_of(dtype: torch.dtype) -> str:
    """A type as people write it."""
    return str(dtype).removeprefix("torch.")


def _named(device: torch.device) -> tuple[str, int]:
    if device.type == "mps":
        return "Apple GPU (mps)", torch.mps.recommended_max_memory()
    if device.type == "cpu":
        return "", 0
    module = torch.get_device_module(device)
    if not hasattr(module, "get_device_properties"):
        return str(device), 0
    properties = module.get_device_properties(device)
    return f"{properties.name} ({device})", properties.total_memory


def _driver(device: torch.device) -> str:
    """What torch is built for, and what the driver here is good for."""
    if device.type == "mps":
        return f"macOS {platform.mac_ver()[0]}"
    if device.type == "xpu":
        return f"oneAPI, driver {torch.xpu.get_device_properties(device).driver_version}"
    if device.type != "cuda":
        return ""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    known = torch._C._cuda_getDriverVersion()  # 12080 for CUDA 12.8
    return f"CUDA {torch.version.cuda}, driver for {known // 1000}.{known % 1000 // 10}"


def room_bytes(device: torch.device, memory_gb: float = 0.0) -> int:
    """Memory of a device that a node may take: `memory_gb`, or a share of it, and no more than is free now."""
    asked = int(memory_gb * 1e9)
    if device.type == "cpu":
        memory = psutil.virtual_memory()
        return min(asked or int(memory.total * OF_PROCESSOR), memory.available)
    free = int(free_bytes(device) * OF_ACCELERATOR)
    return min(asked, free) if asked else free


def free_bytes(device: torch.device) -> int:
    """Memory of a device that nothing has taken, as far as it can tell."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):  # one that does not say shares what the machine has
        return accelerator(device).memory_bytes or psutil.virtual_memory().available
    free, _ = module.mem_get_info(device)
    return free + module.memory_reserved(device) - module.memory_allocated(device)


def say(role: str, device: torch.device, setting: str) -> None:
    """Log what a role computes on, and loudly what it leaves unused."""
    name, memory_bytes, *_ = accelerator(device)
    log.info("%s computes on=%s %s", role, device, f"{name} memory_gb={memory_bytes / 1e9:.1f}" if name else "")
    others = [other for other in present() if not other.startswith(device.type)]
    if device.type == "cpu" and others:
        log.warning("%s leaves %s unused because=%s.device is %r", role, " and ".join(others), role, setting)
