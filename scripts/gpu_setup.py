"""Models, work, clocks and memory for `gpu_sections.py`.

Models have random weights of a given shape: figures of speed, memory and determinism hold for any weights, shares of
flipped tokens are those of a model about as sure of itself as a trained one.
"""

import gc
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from transformers import PreTrainedModel

from farflung.engine.base import Request
from farflung.engine.loading import build
from farflung.engine.local import LocalEngine
from farflung.learner.optimise import Learner, Optimisation
from farflung.learner.pack import Rollout, Segment
from farflung.learner.policy import Policy
from farflung.numerics.devices import blocks, room_bytes
from farflung.numerics.train_precision import compute_dtype

MICROBATCH_TOKENS = 8192


class LeftOut(Exception):
    """The section, or the rest of it, cannot be measured here."""


class Shape(NamedTuple):
    """A Qwen2 model, its output head not tied to its embedding."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def config(self) -> bytes:
        """Its `config.json`."""
        fields = {
            "model_type": "qwen2",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "tie_word_embeddings": False,
        }
        return json.dumps(fields).encode()

    @property
    def parameters(self) -> int:
        """Their number, but for norms and biases."""
        keys = self.hidden * self.kv_heads // self.heads
        layer = self.hidden * (2 * self.hidden + 2 * keys + 3 * self.inner)
        return self.layers * layer + 2 * self.vocab * self.hidden

    def step_bytes(self, tokens: int) -> int:
        """What a checkpointed step of the learner takes, arithmetic in bfloat16, all `tokens` in one pass.

        Either masters, moments, roundings and the layers' inputs, with the scores or the gradients of the output head;
        or all gradients too, with the activations of one layer.
        """
        kept = self.layers * tokens * self.hidden * 4
        scores, head = min(blocks("cuda").head_logits, tokens * self.vocab), self.vocab * self.hidden
        early = 14 * self.parameters + kept + max(12 * scores, 6 * scores + 10 * head)
        late = 18 * self.parameters + tokens * (12 * self.inner + 40 * self.hidden)
        return max(early, late)


TINY = Shape("tiny", 64, 128, 1, 4, 2, 1000)
SHAPES = (
    Shape("Qwen2.5-1.5B with a head of its own", 1536, 8960, 28, 12, 2, 151_936),
    Shape("Qwen2.5-0.5B with a head of its own", 896, 4864, 24, 14, 2, 151_936),
    Shape("a tenth of that", 512, 1536, 12, 8, 2, 32_000),
    TINY,
)


class Amounts(NamedTuple):
    """How much of each is measured."""

    rows: tuple[int, ...]
    new: int
    read: int
    judged: int
    trained: int


FULL = Amounts(rows=(1, 64, 256), new=64, read=4096, judged=32, trained=1984)
LITTLE = Amounts(rows=(1, 8), new=8, read=128, judged=7, trained=64)


class Setup(NamedTuple):
    """The device and the model that are measured."""

    device: torch.device
    shape: Shape
    amounts: Amounts

    @property
    def dtype(self) -> torch.dtype:
        """The arithmetic that roles choose on this device."""
        return compute_dtype("auto", self.device)[0]


def setup_on(device: torch.device, *, is_tiny: bool) -> Setup:
    """The largest shape whose training fits the device, by arithmetic; or the tiny one, in one thread."""
    if is_tiny:
        torch.set_num_threads(1)
        return Setup(device, TINY, LITTLE)
    room = room_bytes(device)
    shape = next((one for one in SHAPES if one.step_bytes(MICROBATCH_TOKENS) <= room), TINY)
    return Setup(device, shape, LITTLE if shape is TINY else FULL)


# --- models and work -------------------------------------------------------------------------------------------------


def drawn(setup: Setup, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the device, with random weights."""
    model = build(setup.shape.config, dtype, setup.device)
    draw(model)
    return model


@torch.no_grad()
def draw(model: PreTrainedModel) -> None:
    """Give a model weights of the usual size, always the same, such as are published, and a trained one's logits."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            parameter.normal_(0, 4 / parameter.shape[1] ** 0.5 if "lm_head" in name else 0.02)
            parameter.copy_(parameter.bfloat16())


def on_cpu(engine: LocalEngine, shape: Shape) -> LocalEngine:
    """An engine with the same weights on the CPU, in float32."""
    need, free = 5 * shape.parameters, psutil.virtual_memory().available
    if need > free:
        raise LeftOut(f"{need / 1e9:.1f} GB of this machine's memory are needed, {free / 1e9:.1f} GB are free")
    judge = LocalEngine(build(shape.config, torch.float32, "cpu"), eos_ids=())
    judge.load((name, tensor.cpu()) for name, tensor in engine.model.state_dict().items())
    return judge


def requests(setup: Setup, rows: int, new: int, prompt: int = 64) -> list[Request]:
    """Prompts at random, each with a seed, all at temperature 1."""
    rng = np.random.default_rng(rows)
    ids = rng.integers(5, setup.shape.vocab, (rows, prompt)).tolist()
    return [Request(tuple(one), int(rng.integers(2**62)), 1.0, new) for one in ids]


def rollouts(setup: Setup, groups: int, new: int, samples: int = 4) -> list[Rollout]:
    """Groups to train on, answers of `new` tokens to a prompt of 64."""
    rng, found = np.random.default_rng(5), list[Rollout]()
    for _ in range(groups):
        prompt = Segment("prompt", tuple(rng.integers(5, setup.shape.vocab, 64).tolist()))
        for _ in range(samples):
            said = Segment("model", tuple(rng.integers(5, setup.shape.vocab, new).tolist()))
            found.append(Rollout((prompt, said), float(rng.normal()), 1.0))
    return found


def policy(setup: Setup) -> Policy:
    """A policy as a run on this device has it, activations checkpointed."""
    model = drawn(setup, torch.float32).requires_grad_(True)
    return Policy(model, compute_dtype=setup.dtype, is_dithered=True, is_checkpointed=True)


def learner(policy: Policy) -> Learner:
    """A learner that has taken no step."""
    return Learner(policy, Optimisation(lr=1e-5))


# --- clocks and memory -----------------------------------------------------------------------------------------------


def seconds(device: torch.device, action: Callable[[], Any]) -> float:
    """How long something takes, until the device is done."""
    _finish(device)
    since = time.perf_counter()
    action()
    _finish(device)
    return time.perf_counter() - since


def _finish(device: torch.device) -> None:
    module = torch.get_device_module(device)
    if device.type == "mps":
        module.synchronize()
    elif device.type != "cpu" and hasattr(module, "synchronize"):
        module.synchronize(device)


def clear(device: torch.device) -> None:
    """Give back what nobody holds any more, and count the peak from here."""
    gc.collect()
    module = torch.get_device_module(device)
    if device.type != "cpu" and hasattr(module, "empty_cache"):
        module.empty_cache()
    if device.type != "cpu" and hasattr(module, "reset_peak_memory_stats"):
        module.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The most that tensors took since `clear`, on a Mac what the driver holds. Raises LeftOut."""
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    module = torch.get_device_module(device)
    if device.type == "cpu" or not hasattr(module, "max_memory_allocated"):
        raise LeftOut(f"torch counts no memory on {device.type}")
    return module.max_memory_allocated(device)
