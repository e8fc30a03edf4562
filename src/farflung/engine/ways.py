"""Ways to decode and replay a model: trials find the fastest one that agrees with one plain pass.

Legend: T predicted tokens of a text, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple, get_args

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from farflung.engine.base import Request
from farflung.engine.cpu.rows import DecodeBatch
from farflung.engine.plain import Batching, PlainBatch, batches
from farflung.engine.replay import Reading, read
from farflung.numerics.trying import Text, Trial, first_that_holds, remembers_all, steady_tokens, tried


class Ways(NamedTuple):
    """The ways that one model allows."""

    is_plain: bool
    """Whether a token's attention may be taken by plain products (`cpu/attention.py`)."""
    batching: Batching
    reading: Reading
    most_tokens: int | None
    """The longest text whose rotations do not depend on its length, if there is one."""


SLOWEST = Ways(is_plain=False, batching="whole", reading="alone", most_tokens=None)
"""Generation and replay without any shortcut."""
_TYPES = (torch.float32, torch.bfloat16)
"""In which attention by plain products is tried."""


def find_ways(model: PreTrainedModel, trial: Trial | None = None) -> Ways:
    """Try a model on a few texts, the fastest way first. A `trial` of it that is at hand need not be made again."""
    if (trial := tried(model, trial)) is None:
        return SLOWEST
    is_plain = attends_plainly(model, trial)
    batching = "padded" if is_plain else first_that_holds(get_args(Batching), partial(_decodes, trial))
    readings = get_args(Reading) if remembers_all(model.config) else get_args(Reading)[1:]
    return Ways(is_plain, batching, first_that_holds(readings, partial(_reads, trial)), steady_tokens(model))


def attends_plainly(model: PreTrainedModel, trial: Trial | None = None) -> bool:
    """Whether a model's attention can be taken by plain products and in two parts, found by trying a few texts."""
    if model.dtype not in _TYPES or not is_whole_on_cpu(model) or (trial := tried(model, trial)) is None:
        return False
    return all(_decodes(trial, "padded", is_plain=True, is_shared=is_shared) for is_shared in (True, False))


def _decodes(trial: Trial, batching: Batching, **how: bool) -> bool:
    def decoded(texts: Sequence[Text]) -> list[torch.Tensor]:
        asked = [Request(text.prompt, index, 0.0, len(text.tail)) for index, text in enumerate(texts)]
        horizon = max(len(text.prompt + text.tail) for text in texts)
        found: dict[int, torch.Tensor] = {}
        for which in batches(asked, batching, len(asked)):
            rows = _rows(trial.model, [asked[index] for index in which], batching, horizon, **how)
            found |= zip(which, _followed(rows, [texts[index] for index in which]), strict=True)
        return [found[index] for index in range(len(texts))]

    return trial.holds(decoded)


def _rows(
    model: PreTrainedModel, requests: Sequence[Request], batching: Batching, horizon: int, **how: bool
) -> DecodeBatch | PlainBatch:
    """The rows of a batch as `LocalEngine.generate` decodes them."""
    if not is_for_cpu(model, batching):
        return PlainBatch(model, requests, is_cached=batching != "whole")
    rows = DecodeBatch(model, horizon, **how)
    rows.join(requests)
    return rows


def is_for_cpu(model: PreTrainedModel, batching: Batching) -> bool:
    """Whether the decoder that is made for CPUs is the one to take."""
    return is_whole_on_cpu(model) and batching != "whole"


def is_whole_on_cpu(model: PreTrainedModel) -> bool:
    """Whether its weights may be read at any time, by what is made for CPUs: shards of several ranks are none."""
    return model.device.type == "cpu" and not isinstance(model, FSDPModule)


def _followed(rows: DecodeBatch | PlainBatch, texts: Sequence[Text]) -> list[torch.Tensor]:
    """Logits (T, V) of the tokens of each text as its rows go on; of several the first leaves halfway."""
    seen: list[list[torch.Tensor]] = [[] for _ in texts]
    live = list(range(len(texts)))
    for step, tokens in enumerate(zip(*(text.tail for text in texts), strict=True)):
        for row, index in enumerate(live):
            seen[index].append(rows.logits_BV[row])
        if len(live) > 1 and step == len(texts[0].tail) // 2:
            live = [live[-1], *live[1:-1]]
            rows.keep(torch.tensor(live, device=rows.device))
        rows.advance(torch.tensor([tokens[index] for index in live], device=rows.device))
    return [torch.stack(parts) for parts in seen]


def _reads(trial: Trial, reading: Reading) -> bool:
    def replayed(texts: Sequence[Text]) -> Iterator[torch.Tensor]:
        items = [(Request(text.prompt, 0, 0.0, len(text.tail)), text.tail) for text in texts]
        found = dict(read(trial.model, items, reading))
        return (found[index] for index in range(len(texts)))

    return trial.holds(replayed)
