"""What this machine has for a run: a device, and room on it for the run's model and its rollouts."""

import asyncio

from farflung.config import WorkerSection
from farflung.engine.arithmetic import arithmetic
from farflung.engine.fit import longest, node_slots
from farflung.net.session import Session
from farflung.numerics.devices import pick
from farflung.weights.tensors import fetch_model_config


async def capacity(session: Session, settings: WorkerSection) -> str:
    """The room for a run on this machine, in words. Raises WeightsError, which says what would fit, or ConfigError."""
    info = session.info
    device = pick("cpu" if settings.engine == "vllm" else settings.device)
    dtype, _ = arithmetic(settings.profile or info.profile)
    config = await fetch_model_config(session)
    slots = await asyncio.to_thread(node_slots, settings, info, device, config, dtype)
    where = "the vLLM server" if settings.engine == "vllm" else str(device)
    return f"{slots} rollouts of {longest(info, settings.context).tokens:,} tokens at once on {where}"
