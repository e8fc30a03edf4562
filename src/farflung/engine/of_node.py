"""The engine that a node's settings name: its numerics before the node joins, itself once the run's model is known."""

import asyncio
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from farflung.config import WorkerSection
from farflung.config.tree import WAVES
from farflung.engine.arithmetic import BITS, Own, dtype_of
from farflung.engine.base import Engine
from farflung.engine.fit import cache_bytes, longest
from farflung.engine.llama_cpp import LlamaCppEngine, own_llama_cpp
from farflung.engine.local import LocalEngine
from farflung.engine.vllm import VllmEngine
from farflung.engine.vllm_answers import server_numerics
from farflung.engine.vllm_process import ManagedVllmEngine, ServerSize, VllmProcess, refuse_missing
from farflung.numerics.devices import pick
from farflung.protocol.errors import ConfigError
from farflung.protocol.messages import RunInfo
from farflung.protocol.numerics import Numerics
from farflung.protocol.stops import Stops

if TYPE_CHECKING:
    from farflung.engine.mlx import MlxEngine


async def own_numerics(settings: WorkerSection) -> Own:
    """The numerics of a node, as far as they are known before it has a profile. Raises ConfigError, Unreachable."""
    if settings.engine == "torch":
        return Own("torch", pick(settings.device).type)
    if settings.engine == "mlx":
        return mlx_numerics(pick(settings.device))
    if settings.engine == "llama.cpp":
        return own_llama_cpp(settings.device)
    if not settings.is_elsewhere:
        refuse_missing(Path(settings.engine_home))
        return Own("vllm", pick(settings.device).type, "bfloat16", BITS["bfloat16"])
    found = await asyncio.to_thread(server_numerics, settings.engine_url)
    kind = settings.device.partition(":")[0].replace("auto", "")
    return found._replace(device=found.device or kind)


def mlx_numerics(device: torch.device) -> Own:
    """Those of MLX in this process. Raises ConfigError where it is missing, or has no such device."""
    if not (find_spec("mlx") and find_spec("mlx_lm")):
        raise ConfigError("MLX is not installed here; get it with: pip install 'farflung[mlx]'")
    if device.type not in ("cpu", "mps"):
        raise ConfigError(f"MLX computes on a Mac's GPU (mps) or on a processor, not on {device}; add --device cpu")
    return Own("mlx", device.type)


def mlx_engine(config: Path | str | bytes, **options: Any) -> "MlxEngine":
    """The empty engine of MLX, which no other engine imports. Raises ConfigError."""
    from farflung.engine.mlx import MlxEngine

    return MlxEngine(config, **options)


def held_in(numerics: Numerics) -> torch.dtype:
    """What this process holds weights in; these two see to their own arithmetic."""
    return torch.bfloat16 if numerics.engine in ("vllm", "llama.cpp") else dtype_of(numerics)


@dataclass(frozen=True)
class Place:
    """What an engine of a node is made of, beside the run's model."""

    settings: WorkerSection
    info: RunInfo
    device: torch.device
    folder: Path
    """For what an engine keeps on disk; no other process of this machine uses it."""
    slots: int
    """Rollouts at once."""


def make(place: Place, config: bytes, dtype: torch.dtype, stops: Stops | None) -> Engine:
    """The empty engine. Raises ConfigError, WeightsError, Unreachable."""
    settings, info = place.settings, place.info
    options = {"eos_ids": info.eos_ids, "stops": stops, "max_rows": place.slots}
    if settings.engine == "llama.cpp":
        return LlamaCppEngine(place.folder, config, device=settings.device, threads=settings.threads, **options)
    if settings.engine == "vllm":
        waves = WAVES * place.slots  # those that the server has no slot for wait there, nearer than here
        options |= {"vocab": info.vocab, "max_rows": waves}
        if settings.is_elsewhere:
            return VllmEngine(settings.engine_url, place.folder, **options)
        process = VllmProcess(Path(settings.engine_home), place.folder, config, _server_size(place, config))
        return ManagedVllmEngine(process, place.folder, **options)
    options |= {"dtype": dtype, "device": place.device}
    if settings.engine == "mlx":
        return mlx_engine(config, **options)
    return LocalEngine.from_folder(config, threads=settings.threads, **options)


def _server_size(place: Place, config: bytes) -> ServerSize:
    """What a server of this node's own is given."""
    text, settings = longest(place.info, place.settings.context), place.settings
    cached = cache_bytes(config, torch.bfloat16, text, place.slots)
    return ServerSize(place.device, text.tokens, place.slots, cached, settings.memory_gb, settings.threads)
