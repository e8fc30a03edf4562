"""The plain decode loop: requests through any Hugging Face causal LM on any device, a token a row at a time.

The decoder that is made for CPUs (`engine/cpu/`) is tested against it; every other device uses it.

Legend: B rows, T positions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache as once
from functools import partial
from inspect import signature
from itertools import groupby
from typing import Any, Literal, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from farflung.engine.argmax import best, policy_scores, with_noise
from farflung.engine.base import Answer, Completion, Request
from farflung.engine.noise import gumbel
from farflung.protocol.stops import Stops

Batching = Literal["padded", "level", "alone", "whole"]
"""Prompts of all lengths in one batch, of one length each, one row at a time; or one row at a time that is read whole
for every token, for models that have no use for a cache."""


class Rows(Protocol):
    """Rows that decode together, whatever computes them."""

    def pick(self, requests: Sequence[Request], said: int) -> tuple[list[int], list[float]]:
        """The token of each row that comes after `said` ones, and its log-probability at the sampling temperature."""
        ...

    def go_on(self, going: Sequence[int]) -> None:
        """Feed what was picked to these rows; the others end."""
        ...


class PlainBatch:
    """Rows that decode together: prompts padded on the left, what was said since, and the logits of what is next."""

    logits_BV: torch.Tensor

    def __init__(self, model: PreTrainedModel, requests: Sequence[Request], *, is_cached: bool = True) -> None:
        """Read the prompts. Without a cache each token takes a pass over the whole text: for rows of one length."""
        self._model, self._cache_name, self._cache = model, cache_name(type(model)) if is_cached else "", None
        prompts, device = [one.prompt_ids for one in requests], model.device
        width, self._is_padded = max(map(len, prompts)), len(set(map(len, prompts))) > 1
        length_B1 = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
        self._ids_BT = torch.tensor([(0,) * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        self._is_seen_BT = torch.arange(width, device=device) >= width - length_B1
        self._read(self._ids_BT)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model.device

    def advance(self, token_B: torch.Tensor) -> None:
        """Feed one token to each row."""
        self._ids_BT = torch.cat([self._ids_BT, token_B[:, None]], dim=1)
        self._is_seen_BT = torch.nn.functional.pad(self._is_seen_BT, (0, 1), value=True)
        self._read(token_B[:, None] if self._cache_name else self._ids_BT)

    def keep(self, live_B: torch.Tensor) -> None:
        """Go on with these rows; the logits are the caller's to make anew."""
        self._ids_BT, self._is_seen_BT = self._ids_BT[live_B], self._is_seen_BT[live_B]
        if self._cache is not None and len(live_B):
            self._cache.reorder_cache(live_B)

    def pick(self, requests: Sequence[Request], said: int) -> tuple[list[int], list[float]]:
        """The token of each row that comes after `said` ones, and its log-probability at the sampling temperature."""
        self._picked_B, logp_B = pick(self.logits_BV, requests, said)
        return _brought(self._picked_B, logp_B)

    def go_on(self, going: Sequence[int]) -> None:
        """Feed what was picked to these rows; the others end."""
        token_B = self._picked_B
        if len(going) < len(token_B):
            going_B = torch.tensor(going, dtype=torch.long, device=self.device)
            token_B = token_B[going_B]
            self.keep(going_B)
        if going:
            self.advance(token_B)

    def _read(self, fed_BT: torch.Tensor) -> None:
        options: dict[str, Any] = {"use_cache": False}
        if self._cache_name:
            options = {"use_cache": True, "logits_to_keep": 1, self._cache_name: self._cache}
        if self._is_padded:
            options["attention_mask"] = self._is_seen_BT.long()
            options["position_ids"] = (self._is_seen_BT.cumsum(1) - 1).clamp_(min=0)[:, -fed_BT.shape[1] :]
        out = self._model(input_ids=fed_BT, **options)
        self._cache = getattr(out, self._cache_name) if self._cache_name else None
        self.logits_BV = out.logits[:, -1]


def decode(
    model: PreTrainedModel,
    requests: Sequence[Request],
    eos_ids: frozenset[int],
    should_stop: Callable[[], bool] | None = None,
    slots: int = 64,
    batching: Batching = "padded",
    stops: Stops | None = None,
) -> list[Completion | None]:
    """Complete all requests, at most `slots` at a time. None for those that `should_stop` left out.

    Each token is argmax(logits / T + Gumbel noise), or argmax(logits) where T = 0; finished rows leave the batch.
    """
    read = partial(PlainBatch, model, is_cached=batching != "whole")
    return complete(read, requests, eos_ids, should_stop, slots, batching, stops)


def complete(
    read: Callable[[Sequence[Request]], Rows],
    requests: Sequence[Request],
    eos_ids: frozenset[int],
    should_stop: Callable[[], bool] | None = None,
    slots: int = 64,
    batching: Batching = "padded",
    stops: Stops | None = None,
) -> list[Completion | None]:
    """The same for rows of any kind: `read` makes a batch of them from its requests."""
    found: list[Completion | None] = [None] * len(requests)
    for batch in batches(requests, batching, slots):
        for start in range(0, len(batch), slots):
            some = batch[start : start + slots]
            asked = [requests[index] for index in some]
            for index, completion in zip(some, _complete(read(asked), asked, eos_ids, should_stop, stops), strict=True):
                found[index] = completion
    return found


def batches(requests: Sequence[Request], batching: Batching, slots: int) -> Iterator[list[int]]:
    """Which requests are decoded together, the longest prompts first and those of a group beside each other."""
    prompts = [one.prompt_ids for one in requests]
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), prompts[index]))
    if batching == "padded":
        yield order
        return
    size = slots if batching == "level" else 1
    for _, level in groupby(order, key=lambda index: len(prompts[index])):
        some = list(level)
        yield from (some[start : start + size] for start in range(0, len(some), size))


def _complete(
    rows: Rows,
    requests: Sequence[Request],
    eos_ids: frozenset[int],
    should_stop: Callable[[], bool] | None,
    stops: Stops | None,
) -> list[Completion | None]:
    answers, live = [Answer(request) for request in requests], list(range(len(requests)))
    done: list[Completion | None] = [None] * len(requests)
    while live and not (should_stop is not None and should_stop()):
        picked = rows.pick([requests[index] for index in live], len(answers[live[0]].said))
        for index, token, logp in zip(live, *picked, strict=True):
            done[index] = answers[index].add(token, logp, eos_ids, stops)
        going = [row for row, index in enumerate(live) if done[index] is None]
        live = [live[row] for row in going]
        rows.go_on(going)
    return done


def pick(
    logits_BV: torch.Tensor, requests: Sequence[Request], said: int | Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of each row that comes after `said` ones, and its log-probability at the sampling temperature."""
    said_B = [said] * len(requests) if isinstance(said, int) else said
    temperature_B = np.array([one.temperature for one in requests], np.float32)
    policy_BV = policy_scores(logits_BV, temperature_B)
    position_B = [one.first_position + count for one, count in zip(requests, said_B, strict=True)]
    noise_BV = gumbel([one.seed for one in requests], position_B, policy_BV.shape[1], policy_BV.device)
    token_B = best(with_noise(noise_BV, policy_BV, temperature_B))
    return token_B, policy_BV.log_softmax(-1).gather(-1, token_B[:, None])[:, 0]


def _brought(token_B: torch.Tensor, logp_B: torch.Tensor) -> tuple[list[int], list[float]]:
    """Both in one copy from the device: each copy waits for all that was asked of it."""
    both_2B = torch.stack([token_B.int(), logp_B.view(torch.int32)]).cpu()
    return both_2B[0].tolist(), both_2B[1].view(torch.float32).tolist()


@once
def cache_name(kind: type[PreTrainedModel]) -> str:
    """The argument by which a class of models is given its cache."""
    return "cache_params" if "cache_params" in signature(kind.forward).parameters else "past_key_values"
