"""What this machine has for a run: a device, room on it for the run's model, and how fast it would make tokens."""

import asyncio
import gc
import time
from typing import TYPE_CHECKING

import torch

from farflung.config import WorkerSection
from farflung.engine.arithmetic import choose
from farflung.engine.base import Request
from farflung.engine.fit import longest, node_slots
from farflung.engine.llama_library import device_kind
from farflung.engine.local import LocalEngine
from farflung.engine.of_node import held_in, mlx_engine, mlx_numerics, own_numerics
from farflung.net.session import Session
from farflung.numerics.devices import accelerator, pick
from farflung.weights.tensors import fetch_model_config

if TYPE_CHECKING:
    from farflung.engine.mlx import MlxEngine

PROMPT, NEW = 32, 32
"""Tokens of the texts by which speed is measured."""
MOST_S = 10.0


def device(settings: WorkerSection) -> str:
    """The device that a node with these settings computes on, in words. Raises ConfigError."""
    if settings.is_elsewhere:
        return f"the vLLM server at {settings.engine_url} has its own"
    chosen = pick(settings.device)
    if settings.engine == "mlx":
        mlx_numerics(chosen)
    if settings.engine == "llama.cpp" and (kind := device_kind(settings.device)) != "cpu":
        return f"{kind}, as llama.cpp calls it"
    name, memory_bytes, driver, precision = accelerator(chosen)
    memory = f"{memory_bytes / 1e9:.1f} GB" if memory_bytes else ""
    return ", ".join(part for part in (name or str(chosen), memory, driver, f"computes in {precision}") if part)


class Machine:
    """This machine as a node of one run, with a node's settings, before anything is fetched but `config.json`."""

    def __init__(self, session: Session, settings: WorkerSection) -> None:
        self._session, self._settings = session, settings
        self._slots = 0
        self._config: bytes
        self._dtype: torch.dtype

    async def capacity(self) -> str:
        """The room for the run, in words. Raises WeightsError, which says what would fit, ConfigError, Unreachable."""
        info, settings = self._session.info, self._settings
        device = pick("cpu" if settings.is_elsewhere else settings.device)
        profile = info.profiles[choose(info, await own_numerics(settings), settings.profile)]
        self._dtype, self._config = held_in(profile), await fetch_model_config(self._session)
        self._slots = await asyncio.to_thread(node_slots, settings, info, device, self._config, self._dtype)
        where = "the vLLM server" if settings.is_elsewhere else str(device)
        return f"{self._slots} rollouts of {longest(info, settings.context).tokens:,} tokens at once on {where}"

    async def expected_tokens_per_s(self) -> float:
        """Tokens a second for which there was `capacity`, in short answers; 0 where that is not measured."""
        if self._settings.engine in ("vllm", "llama.cpp"):
            return 0.0
        return await asyncio.to_thread(self._measured)

    def _measured(self) -> float:
        chosen, threads = pick(self._settings.device), self._settings.threads
        options = {"dtype": self._dtype, "device": chosen, "eos_ids": (), "max_rows": self._slots}
        if self._settings.engine == "mlx":
            return measured(mlx_engine(self._config, **options), self._slots)
        found = measured(LocalEngine.from_folder(self._config, threads=threads, **options), self._slots)
        gc.collect()
        if chosen.type not in ("cpu", "mps"):
            torch.get_device_module(chosen).empty_cache()  # the worker measures what is free
        return found


def measured(engine: "LocalEngine | MlxEngine", rows: int) -> float:
    """Tokens a second of a batch of rows, by an engine whose weights are yet to come: they are made up."""
    for_meta = {"device": "cpu"} if engine.model.device.type == "meta" else {}
    engine.load((name, torch.full_like(one, 0.01, **for_meta)) for name, one in engine.model.state_dict().items())
    prompt, steps = (1,) * PROMPT, list[float]()
    if isinstance(engine, LocalEngine):
        engine.find_ways()

    def is_over() -> bool:
        steps.append(time.monotonic())
        return steps[-1] - steps[0] > MOST_S and len(steps) > 2

    engine.generate([Request(prompt, seed, 1.0, NEW) for seed in range(rows)], is_over)
    first = min(1, len(steps) - 2)  # before the second token the prompts were read
    return rows * (len(steps) - 1 - first) / (steps[-1] - steps[first])
