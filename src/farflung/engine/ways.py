"""Ways to decode and replay a model: trials find the fastest one that agrees with one plain pass.

Legend: T predicted tokens of a text, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from transformers import PreTrainedModel

from farflung.engine.base import Request
from farflung.engine.decode import Batching, attends_plainly, batches, followed, rows_of
from farflung.engine.replay import Reading, read
from farflung.numerics.trying import FAULTS, Text, Trial, remembers_all, steady_tokens


class Ways(NamedTuple):
    """What holds for one model."""

    is_plain: bool
    """Whether a token's attention may be taken by plain products (`attention.py`)."""
    batching: Batching
    reading: Reading
    most_tokens: int | None
    """The longest text whose rotations do not depend on its length, if there is one."""


SLOWEST = Ways(is_plain=False, batching="whole", reading="alone", most_tokens=None)
"""What is plain itself."""


def find_ways(model: PreTrainedModel, trial: Trial | None = None) -> Ways:
    """Try a model on a few texts, the fastest way first. A `trial` of it that is at hand need not be made again."""
    try:
        trial = trial or Trial(model)
    except FAULTS:
        return SLOWEST
    is_plain = attends_plainly(model, trial)
    batching = "padded" if is_plain else _first(get_args(Batching), partial(_decodes, trial))
    readings = get_args(Reading) if remembers_all(model.config) else get_args(Reading)[1:]
    return Ways(is_plain, batching, _first(readings, partial(_reads, trial)), steady_tokens(model))


def _first(names: Sequence[Any], holds: Callable[[Any], bool]) -> Any:
    """The first that holds, else the last."""
    return next((name for name in names[:-1] if holds(name)), names[-1])


def _decodes(trial: Trial, batching: Batching) -> bool:
    def decoded(texts: Sequence[Text]) -> list[torch.Tensor]:
        asked = [Request(text.prompt, index, 0.0, len(text.tail)) for index, text in enumerate(texts)]
        found: dict[int, torch.Tensor] = {}
        for batch in batches(asked, batching, len(asked)):
            which = [request.seed for request in batch]
            rows = rows_of(batching)(trial.model, max(len(text.prompt + text.tail) for text in texts))
            found |= zip(which, followed(rows, [texts[index] for index in which]), strict=True)
        return [found[index] for index in range(len(texts))]

    return trial.holds(decoded)


def _reads(trial: Trial, reading: Reading) -> bool:
    def replayed(texts: Sequence[Text]) -> Iterator[torch.Tensor]:
        items = [(Request(text.prompt, 0, 0.0, len(text.tail)), text.tail) for text in texts]
        found = dict(read(trial.model, items, reading))
        return (found[index] for index in range(len(texts)))

    return trial.holds(replayed)
