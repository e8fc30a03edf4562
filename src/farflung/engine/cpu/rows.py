"""The live rows of a decoding batch inside the model: prompts read once, cache, mask, positions and the next logits.

Legend: B live rows, G different prompts, T columns of the cache, V vocabulary, D hidden size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from farflung.engine.base import Request
from farflung.engine.cpu.attention import HELD_IN, Held, SharedPrompts, attending, masked
from farflung.engine.cpu.kv_cache import PreallocatedCache
from farflung.engine.plain import cache_name

_Prompt = tuple[int, ...]


class _Answers(NamedTuple):
    """The model's answers after different prompts."""

    prompts: list[_Prompt]
    logits_GV: torch.Tensor

    def of(self, requests: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
        """Which prompt each request has, and how long that is (B,)."""
        place = {prompt: index for index, prompt in enumerate(self.prompts)}
        asked = [(place[one.prompt_ids], len(one.prompt_ids)) for one in requests]
        return torch.tensor(asked, device=self.logits_GV.device).unbind(-1)

    def only(self, kept: list[int]) -> "_Answers":
        """Those of some prompts."""
        return _Answers([self.prompts[index] for index in kept], self.logits_GV[kept])

    def and_of(self, other: "_Answers") -> "_Answers":
        """Those of other prompts behind them."""
        return _Answers(self.prompts + other.prompts, torch.cat([self.logits_GV, other.logits_GV]))


class _Read(NamedTuple):
    """Different prompts, padded on the left, as the model has read them."""

    answers: _Answers
    cache: PreallocatedCache
    seen_GT: torch.Tensor
    """False where a prompt is padded."""


class DecodeBatch:
    """All rows grow in the same column of the cache; what is on the left of a row's first column is masked.

    A prompt that several requests share, as in a group, is read once. Where prompts are shared in attention too, the
    cache holds what follows them, and a prompt is there for those that join later. Else a row that joins has its prompt
    in the columns before the next one, so the longest prompts come first.
    """

    logits_BV: torch.Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        horizon: int,
        *,
        is_plain: bool = False,
        is_shared: bool = False,
    ) -> None:
        """`horizon` is the most positions that a row may come to; only plain attention (`attention.py`) is shared."""
        self._model, self._horizon = model, horizon
        self._is_plain, self._is_shared = is_plain, is_shared
        self._shared: SharedPrompts | None = None
        self._start_B = torch.empty(0, dtype=torch.long)
        """The first column of each row; it has `_before_B` positions before that, in a shared prompt."""

    def __len__(self) -> int:
        return len(self._start_B)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model.device

    @property
    def may_grow(self) -> bool:
        """Whether rows may join those that are here: not where a layer remembers more than keys and values."""
        return not len(self) or self._cache.is_plain

    def join(self, requests: Sequence[Request]) -> None:
        """Read these requests' prompts; their rows come behind those that are here."""
        prompts = list(dict.fromkeys(one.prompt_ids for one in requests))
        if not len(self):
            self._begin(self._read(prompts), requests)
        elif self._shared is not None:
            self._forget(0)
            self._share(self._shared, prompts, requests)
        else:
            self._forget(max(map(len, prompts)))
            self._add(self._read(prompts), requests)
        self._is_padded = bool((self._start_B != 0).any())

    def advance(self, token_B: torch.Tensor) -> None:
        """Feed one token to each row."""
        place_B1 = (self._column - self._start_B + self._before_B)[:, None]
        self._column += 1
        hidden_BT = None
        if self._is_padded:
            hidden_BT = torch.arange(self._column, device=token_B.device) < self._start_B[:, None]
        if self._is_plain:
            held = Held(None if hidden_BT is None else masked(hidden_BT), self._shared)
            with attending(self._model):
                self.logits_BV = self._forward(self._cache, token_B[:, None], place_B1, None, held=held)
        else:
            mask_BT = None if hidden_BT is None else (~hidden_BT).long()
            self.logits_BV = self._forward(self._cache, token_B[:, None], place_B1, mask_BT)

    def keep(self, live_B: torch.Tensor) -> None:
        """Go on with these rows; the logits are the caller's to make anew."""
        self._start_B, self._before_B = self._start_B[live_B], self._before_B[live_B]
        if not len(live_B):
            return
        self._cache.keep(live_B)
        if self._shared is not None:
            self._shared.keep(live_B)

    def _read(self, prompts: list[_Prompt]) -> _Read:
        width, device = max(map(len, prompts)), self.device
        length_G = torch.tensor([len(prompt) for prompt in prompts], device=device)
        ids_GT = torch.tensor([(0,) * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        place_GT = torch.arange(width, device=device) - (width - length_G)[:, None]
        cache = PreallocatedCache(self._model, self._horizon, HELD_IN if self._is_plain else None)
        seen_GT = place_GT >= 0
        mask_GT = None if seen_GT.all() else seen_GT.long()
        answers = _Answers(prompts, self._forward(cache, ids_GT, place_GT.clamp_(min=0), mask_GT))
        return _Read(answers, cache, seen_GT)

    def _begin(self, read: _Read, requests: Sequence[Request]) -> None:
        """The first rows, or the first after all others have left."""
        asked_B, length_B = read.answers.of(requests)
        self._cache, nothing_B = read.cache, torch.zeros_like(length_B)
        if self._is_shared:
            self._answers = read.answers
            self._shared = SharedPrompts(read.cache.take(), asked_B, read.seen_GT)
            self._column, self._start_B, self._before_B = 0, nothing_B, length_B
        else:
            self._cache.spread(asked_B)
            self._column = int(length_B.max())
            self._start_B, self._before_B = self._column - length_B, nothing_B
        self.logits_BV = read.answers.logits_GV[asked_B]

    def _share(self, shared: SharedPrompts, prompts: list[_Prompt], requests: Sequence[Request]) -> None:
        """More rows, of which only those prompts are read that are not here already."""
        held, used = self._answers.prompts, shared.used()
        kept = [index for index, prompt in enumerate(held) if index in used or prompt in prompts]
        self._answers = self._answers.only(kept)
        shared.keep_prompts(kept)
        if fresh := [prompt for prompt in prompts if prompt not in held]:
            read = self._read(fresh)
            self._answers = self._answers.and_of(read.answers)
            shared.add_prompts(read.cache.take(), read.seen_GT)
        asked_B, length_B = self._answers.of(requests)
        shared.add(asked_B)
        self._cache.add_empty(len(requests))
        self._extend(self._answers, asked_B, torch.full_like(length_B, self._column), length_B)

    def _add(self, read: _Read, requests: Sequence[Request]) -> None:
        """More rows, each behind a copy of its prompt."""
        asked_B, length_B = read.answers.of(requests)
        self._cache.add([(keys[asked_B], values[asked_B]) for keys, values in read.cache.take()])
        self._extend(read.answers, asked_B, self._column - length_B, torch.zeros_like(length_B))

    def _extend(self, answers: _Answers, asked_B: torch.Tensor, start_B: torch.Tensor, before_B: torch.Tensor) -> None:
        self._start_B, self._before_B = torch.cat([self._start_B, start_B]), torch.cat([self._before_B, before_B])
        self.logits_BV = torch.cat([self.logits_BV, answers.logits_GV[asked_B]])

    def _forget(self, longest: int) -> None:
        """Leave out the first columns, which belong to rows that have left, but for what the longest prompt needs."""
        count = min(int(self._start_B.min()), self._column - longest)
        if count > 0:
            self._cache.forget(count)
            self._column -= count
            self._start_B = self._start_B - count

    def _forward(
        self,
        cache: PreallocatedCache,
        ids_BT: torch.Tensor,
        place_BT: torch.Tensor,
        mask_BT: torch.Tensor | None,
        **options: Any,
    ) -> torch.Tensor:
        """Logits of each row's last token."""
        options |= {cache_name(type(self._model)): cache.layers}
        # The last column by mask, not by slice: a strided bf16 input makes the output head 1,000 times slower on CPUs.
        is_last_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        is_last_BT[:, -1] = True
        out = self._model(
            input_ids=ids_BT,
            position_ids=place_BT,
            attention_mask=mask_BT,
            use_cache=True,
            logits_to_keep=is_last_BT,
            **options,
        )
        return out.logits.view(len(ids_BT), -1).contiguous()
