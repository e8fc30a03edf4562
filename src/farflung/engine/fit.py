"""Whether a model fits a device, and with how many rollouts at once: arithmetic, before anything is fetched.

A device holds the weights, and beside them whichever is larger: what decoding takes for all rows at once, or what a
replay takes. Weights of another version are copied into their places one tensor at a time, so a swap takes the largest
tensor once more, not the model. This machine's own memory is asked for the model only where it is the device.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from transformers import PreTrainedModel

from farflung.config import WorkerSection
from farflung.engine.config_check import BUILD_S, metered
from farflung.engine.cpu.attention import HELD_IN
from farflung.engine.cpu.matmul import MOST_PACKED
from farflung.engine.loading import build
from farflung.engine.replay import REPLAY_TOKENS
from farflung.numerics.devices import accelerator, blocks, name_of, present, room_bytes
from farflung.numerics.trying import FAULTS
from farflung.protocol.errors import WeightsError
from farflung.protocol.messages import RunInfo

MOST_BYTES = 2e12
"""A model of more is not measured at all: DeepSeek V3 has 1.3e12 in bfloat16."""
MOST_ROWS = {"cpu": 64}
"""Most rollouts at once that are chosen by kind of device; more gain nothing there."""
MOST_ROWS_ELSEWHERE = 256
"""A vLLM server too takes so many by default."""
SAMPLING_BYTES = 32
"""Of a value of the logits while a token is picked: its type and float32, noise, two buffers of hashes, softmax."""
SCORING_BYTES = 28
"""The same in a replay."""
LAYER_VALUES = 4
"""Values that a layer makes of a token at once, as a multiple of its widest matrix: gate, activated, up, product."""
HOST_BYTES = 256 << 20
"""Of this machine's memory, for shards on their way, where the model is on a device of its own."""


class Text(NamedTuple):
    """The longest text of a run, in tokens."""

    prompt: int
    new: int

    @property
    def tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt + self.new


UNKNOWN = Text(1024, 1024)
"""Assumed where a run does not say how long its texts are."""


def longest(info: RunInfo, context: int = 0) -> Text:
    """The longest text of a run that a node takes: none of more than `context` tokens, 0 for no limit."""
    return shortened(Text(info.longest_prompt or UNKNOWN.prompt, info.max_new_tokens or UNKNOWN.new), context)


class Place(NamedTuple):
    """A device as far as room goes."""

    name: str
    device: str
    """As torch calls it: cpu, cuda:0, mps."""
    bytes: int
    """So much of it may be taken."""

    @property
    def kind(self) -> str:
        """cpu, cuda, xpu, mps."""
        return self.device.partition(":")[0]


def place(device: torch.device, memory_gb: float = 0.0) -> Place:
    """A device of this machine as it is now; `memory_gb` is the most that may be taken of it, 0 for a share."""
    return Place(accelerator(device).name or "this machine's memory", str(device), room_bytes(device, memory_gb))


def elsewhere(device: torch.device) -> Iterator[Place]:
    """The other devices of this machine, each looked at when it is asked for."""
    return (place(other) for other in map(torch.device, present()) if other != device)


@dataclass(frozen=True)
class Size:
    """A model in one precision, as counts."""

    parameters: int
    dtype: torch.dtype
    weights_bytes: int
    """Of parameters, tied ones once, and of buffers."""
    largest_bytes: int
    """Of the largest tensor."""
    vocab: int
    widest: int
    """Values of a token in the widest matrix that is not the embedding."""
    attended: int
    """Values of a token over all attention heads of a layer."""
    cached: tuple[tuple[int, int], ...]
    """Values of a token that the cache keeps, and of how many tokens at most, 0 for all."""

    def cached_values(self, tokens: int) -> int:
        """Values in the cache of one row of so many tokens."""
        return sum(values * (min(tokens, window) if window else tokens) for values, window in self.cached)


def measure(config: Path | str | bytes, dtype: torch.dtype, limit_bytes: float = MOST_BYTES) -> Size:
    """The size of the model of a `config.json`, found without taking it. Raises ConfigError, WeightsError."""
    with torch.device("meta"), metered(limit_bytes):
        model = build(config, dtype)
    settings, tensors = model.config.get_text_config(), [*model.parameters(), *model.buffers()]
    vocab = settings.vocab_size
    inner = [max(one.shape) for one in model.parameters() if one.dim() > 1 and vocab not in one.shape]
    cached, attended = _cached(model)
    return Size(
        parameters=sum(one.numel() for one in model.parameters()),
        dtype=dtype,
        weights_bytes=sum(one.nbytes for one in tensors),
        largest_bytes=max(one.nbytes for one in tensors),
        vocab=vocab,
        widest=max(inner, default=1),
        attended=attended,
        cached=cached,
    )


def _cached(model: PreTrainedModel) -> tuple[tuple[tuple[int, int], ...], int]:
    """What each layer keeps of a token, seen where one token is read without memory; else as heads and sizes tell."""
    settings = model.config.get_text_config()
    heads = getattr(settings, "num_attention_heads", None) or 1
    head = getattr(settings, "head_dim", None) or getattr(settings, "hidden_size", 1) // heads
    try:
        layers = _read_one(model)
        kept = [
            (layer.keys.numel() + layer.values.numel(), int(getattr(layer, "sliding_window", 0) or 0))
            for layer in layers
        ]
    except FAULTS:
        kept = [(2 * heads * head, 0)] * (getattr(settings, "num_hidden_layers", None) or 1)
    return tuple(kept), heads * head


@torch.inference_mode()
def _read_one(model: PreTrainedModel) -> Sequence[Any]:
    """The layers of the cache after one token, on the meta device. Raises WeightsError where that takes too long."""
    until = time.thread_time() + BUILD_S

    def check(*_: Any) -> None:
        if time.thread_time() > until:
            raise WeightsError(f"the run's model is not read within {BUILD_S:.0f} s; join another run")

    for part in model.modules():  # a hook for all modules of the process would be other threads' too
        part.register_forward_pre_hook(check)
    token_11 = torch.zeros(1, 1, dtype=torch.long, device="meta")
    return model(input_ids=token_11, use_cache=True).past_key_values.layers


# --- what it takes ---------------------------------------------------------------------------------------------------


def held_bytes(size: Size, kind: str) -> int:
    """Weights as a device of this kind holds them; a CPU packs those of small models once more."""
    return size.weights_bytes * (2 if kind == "cpu" and size.parameters <= MOST_PACKED else 1)


def row_bytes(size: Size, kind: str, text: Text) -> int:
    """Of one rollout in a batch: its keys and values, and the work of one layer and of one pick."""
    value = size.dtype.itemsize
    held = HELD_IN.itemsize if kind == "cpu" else value
    attending, reading = 2 * size.attended * text.tokens, LAYER_VALUES * size.widest * text.prompt
    return size.cached_values(text.tokens) * held + max(attending, reading) * value + SAMPLING_BYTES * size.vocab


def replay_bytes(size: Size, kind: str, text: Text) -> int:
    """Of a replay: the logits of as many tokens as are read at once, their scores, and the work of one layer."""
    at_once, value = blocks(kind), size.dtype.itemsize
    tokens = max(REPLAY_TOKENS, text.tokens)
    logits = min(max(at_once.logits, text.new * size.vocab), tokens * size.vocab)
    scores = min(at_once.scores, tokens * size.vocab)
    return logits * value + scores * SCORING_BYTES + LAYER_VALUES * size.widest * tokens * value


def needed_bytes(size: Size, kind: str, text: Text, rows: int) -> int:
    """Of a device that holds the model, decodes so many rollouts at once, and replays as well."""
    beside = max(rows * row_bytes(size, kind, text), replay_bytes(size, kind, text), size.largest_bytes)
    return held_bytes(size, kind) + beside


def cache_bytes(config: Path | str | bytes, dtype: torch.dtype, text: Text, rows: int) -> int:
    """Of keys and values of so many texts."""
    return rows * measure(config, dtype).cached_values(text.tokens) * dtype.itemsize


def host_bytes(size: Size) -> int:
    """Of this machine's memory where the model is elsewhere: a tensor in parts and joined, and shards on their way."""
    return HOST_BYTES + 2 * size.largest_bytes


# --- what fits -------------------------------------------------------------------------------------------------------


def most_rows(size: Size, place: Place, text: Text) -> int:
    """How many rollouts at once a place has room for, 0 where it has none for the model."""
    if needed_bytes(size, place.kind, text, 1) > place.bytes:
        return 0
    return (place.bytes - held_bytes(size, place.kind)) // row_bytes(size, place.kind, text)


def fit(size: Size, place: Place, text: Text, slots: int = 0, *, most: int = 0, others: Iterable[Place] = ()) -> int:
    """Rollouts at once: `slots`, or where that is 0 as many as there is room for, `most` or what is worth it at most.

    Raises WeightsError where there is no room for them; it says what would fit, on one of the `others` too.
    """
    rows = most_rows(size, place, text)
    if slots > rows or not rows:
        raise WeightsError(f"{_misfit(size, place, text, max(1, slots))}; {_ways_out(size, place, text, rows, others)}")
    return slots or min(rows, most or MOST_ROWS.get(place.kind, MOST_ROWS_ELSEWHERE))


def refuse_host(size: Size, free_bytes: int) -> None:
    """Raise WeightsError for a machine whose own memory does not take what is on its way to a device."""
    if host_bytes(size) > free_bytes:
        raise WeightsError(
            f"weights on their way take {_gb(host_bytes(size))} of this machine's memory, {_gb(free_bytes)} are free; "
            "close other programs"
        )


def slots_on(
    device: torch.device,
    config: Path | str | bytes,
    dtype: torch.dtype,
    text: Text,
    slots: int = 0,
    *,
    memory_gb: float = 0.0,
    most: int = 0,
    is_head_whole: bool = False,
) -> int:
    """How many rollouts an engine of this machine makes at once. Raises WeightsError where none, ConfigError.

    `is_head_whole` says that the output head is held in float32.
    """
    size = measure(config, dtype)
    if is_head_whole:
        size = with_whole_head(size)
    if device.type != "cpu":
        refuse_host(size, psutil.virtual_memory().available)
    return fit(size, place(device, memory_gb), text, slots, most=most, others=elsewhere(device))


def _misfit(size: Size, place: Place, text: Text, rows: int) -> str:
    return (
        f"the run's model takes {_gb(held_bytes(size, place.kind))} in {name_of(size.dtype)}, and with {rows} "
        f"rollout{'s' * (rows > 1)} of {text.tokens:,} tokens at once {_gb(needed_bytes(size, place.kind, text, rows))}"
        f"; {place.name} has {_gb(place.bytes)} for it"
    )


def _ways_out(size: Size, place: Place, text: Text, rows: int, others: Iterable[Place]) -> str:
    """What would fit instead."""
    if rows:
        return f"{rows} at once would fit: --slots {rows}, or 0 for as many as fit"
    ways = [f"--context {tokens}" for tokens in [_longest(size, place, text)] if tokens]
    found = [(other, most_rows(size, other, text)) for other in others]
    ways += [f"--device {other.device}, {count} at once" for other, count in found if count]
    if size.dtype == torch.float32 and most_rows(halved(size), place, text):
        ways.append("a profile in bfloat16, if the run admits one")
    ways.append(f"a device with {_gb(needed_bytes(size, place.kind, text, 1))} to give")
    return f"what would fit: {', or '.join(ways)}"


def halved(size: Size) -> Size:
    """The same model in bfloat16, if it is in float32."""
    halves = {"weights_bytes": size.weights_bytes // 2, "largest_bytes": size.largest_bytes // 2}
    return Size(**(vars(size) | halves | {"dtype": torch.bfloat16}))


def with_whole_head(size: Size) -> Size:
    """The same with an output head in float32, which is no larger than the largest tensor."""
    more_bytes = size.largest_bytes * (4 - size.dtype.itemsize) // size.dtype.itemsize
    return replace(size, weights_bytes=size.weights_bytes + more_bytes)


def shortened(text: Text, tokens: int) -> Text:
    """The same where a node takes no text of more tokens; 0 for no limit."""
    if not 0 < tokens < text.tokens:
        return text
    prompt = min(text.prompt, tokens // 2)
    return Text(prompt, tokens - prompt)


def _longest(size: Size, place: Place, text: Text) -> int:
    """The longest texts for which there is room, in tokens, a power of two; 0 where there is for none worth it."""
    fits: Callable[[int], bool] = partial(_has_room, size, place, text)
    return next((tokens for tokens in (2**power for power in range(17, 7, -1)) if fits(tokens)), 0)


def _has_room(size: Size, place: Place, text: Text, tokens: int) -> bool:
    return tokens < text.tokens and most_rows(size, place, shortened(text, tokens)) > 0


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"


def node_slots(settings: WorkerSection, info: RunInfo, device: torch.device, config: bytes, dtype: torch.dtype) -> int:
    """How many rollouts a node makes at once, before it fetches anything. Raises WeightsError where none, ConfigError.

    A vLLM server has its room already, and lets wait what it has none for: then only this machine's memory is asked.
    """
    if settings.is_elsewhere:
        refuse_host(measure(config, dtype), psutil.virtual_memory().available)
        return settings.slots or MOST_ROWS_ELSEWHERE
    text = longest(info, settings.context)
    options = {"memory_gb": settings.memory_gb, "is_head_whole": settings.engine == "mlx"}
    return slots_on(device, config, dtype, text, settings.slots, **options)
