"""The decode loop: a batch of requests through one Hugging Face causal LM with a KV cache and seeded noise.

Legend: R requests, B live rows, G different prompts, T positions, V vocabulary, D hidden size, K positions of noise
made ahead.
"""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from farflung.engine.base import Completion, Request
from farflung.engine.cache import RoomyCache, compacted
from farflung.engine.choice import best, log_sum_exp, silenced, tempered
from farflung.engine.fingerprint import Sketches, Tap, tapped
from farflung.engine.noise import gumbel
from farflung.engine.shared import SharedPrompts, attending, has_kernel, is_worth_sharing

_TOLERANCE = 1e-2
"""Most by which logits of a model that is tried may differ, in their standard deviations."""
_NOISE_AHEAD = 1 << 16
"""Noise values made at once. For a vocabulary of 32, 32 positions at a time cost 12 us each instead of 100."""


def decode(
    model: PreTrainedModel,
    requests: Sequence[Request],
    eos_ids: frozenset[int],
    should_stop: Callable[[], bool] | None = None,
    can_share: Callable[[], bool] = lambda: False,
) -> list[Completion | None]:
    """Complete all requests as one batch, in order; None for those that `should_stop` left incomplete.

    Each token is argmax(logits / T + Gumbel noise), or argmax(logits) where T = 0; finished rows leave the batch.
    `can_share` is asked where attention to prompts that rows share would pay (see `shares_prompts`).
    """
    prompts = {request.prompt_ids for request in requests}
    is_shared = is_worth_sharing(list(prompts), len(requests)) and can_share()
    with tapped(model, requests) as tap:
        return _decode(_Rows(model, requests, tap, is_shared=is_shared), requests, eos_ids, should_stop)


def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether a model's attention can be taken in two parts, found by trying it on a few tokens."""
    if not has_kernel(model):
        return False
    vocab = model.config.get_text_config().vocab_size
    prompts = [tuple(token % vocab for token in part) for part in ((5, 3, 8, 2), (7, 1, 4))]
    asked = [Request(prompt, 0, 0.0, 4) for prompt in (*prompts, *prompts)]

    def seen(*, is_shared: bool) -> torch.Tensor:
        rows = _Rows(model, asked, is_shared=is_shared)
        rows.advance(torch.tensor([1, 2, 3, 4]) % vocab)
        rows.keep(torch.tensor([3, 1, 2]))
        rows.advance(torch.tensor([4, 3, 2]) % vocab)
        return rows.logits_BV.float()

    try:
        parted_BV, whole_BV = seen(is_shared=True), seen(is_shared=False)
    except (RuntimeError, TypeError, ValueError, AttributeError):  # it asks for other attention, or not in this way
        return False
    return bool((parted_BV - whole_BV).abs().max() <= _TOLERANCE * whole_BV.std())


def _decode(
    rows: "_Rows",
    requests: Sequence[Request],
    eos_ids: frozenset[int],
    should_stop: Callable[[], bool] | None,
) -> list[Completion | None]:
    device = rows.logits_BV.device
    sketches = None if rows.fed_BD is None else Sketches(requests, rows.fed_BD.shape[-1], device)
    sampler = _Sampler(requests, device)
    record = _Record(requests, eos_ids, device)
    for position in range(max(request.budget for request in requests)):
        if should_stop is not None and should_stop():
            break
        if sketches is not None and rows.fed_BD is not None:
            sketches.add(rows.fed_BD, record.row_B, position)
        token_B, logp_B = sampler.pick(rows.logits_BV, position)
        live_B = record.add(token_B, logp_B, position)
        if live_B is not None:
            if not len(live_B):
                break
            token_B = token_B[live_B]
            for part in (rows, sampler, record):
                part.keep(live_B)
        rows.advance(token_B)
    return record.completions(sketches)


class _Rows:
    """The live rows inside the model: cache, mask, positions and the logits of the next token.

    Prompts are padded on the left, so that all rows grow in the same column; padding is masked and not counted.
    A prompt that several requests share, as in a group, is read once. Where prompts are shared in attention too, the
    cache holds what follows them.
    """

    logits_BV: torch.Tensor
    fed_BD: torch.Tensor | None = None
    """What the output head was fed for these logits, if there is a tap."""

    def __init__(
        self, model: PreTrainedModel, requests: Sequence[Request], tap: Tap | None = None, *, is_shared: bool = False
    ) -> None:
        self._model, self._tap = model, tap
        self._shared: SharedPrompts | None = None
        prompts = list(dict.fromkeys(request.prompt_ids for request in requests))
        width, horizon = max(map(len, prompts)), max(request.budget for request in requests)
        self._cache = RoomyCache(model, width + horizon)
        start_B1 = torch.tensor([[width - len(prompt)] for prompt in prompts], device=model.device)
        column_T = torch.arange(width + horizon, device=model.device)
        self._mask_BT = (column_T >= start_B1).long() if start_B1.any() else None
        self._place_BT = (column_T - start_B1).clamp_(min=0)
        self._column = width
        ids_BT = torch.tensor([(0,) * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
        self._forward(ids_BT, self._place_BT[:, :width])
        row_of = {prompt: row for row, prompt in enumerate(prompts)}
        asked_B = torch.tensor([row_of[request.prompt_ids] for request in requests], device=model.device)
        if is_shared:
            seen_GT = None if self._mask_BT is None else self._mask_BT[:, :width]
            self._shared, self._mask_BT = SharedPrompts(self._cache.take(), asked_B, seen_GT), None
        else:
            self._cache.spread(asked_B)
        self._choose(asked_B)
        self.logits_BV = self.logits_BV[asked_B]
        if self.fed_BD is not None:
            self.fed_BD = self.fed_BD[asked_B]

    def advance(self, token_B: torch.Tensor) -> None:
        """Feed one token to each row."""
        place_B1 = self._place_BT[:, self._column : self._column + 1]
        self._column += 1
        if self._shared is None:
            self._forward(token_B[:, None], place_B1)
        else:
            with attending(self._model):
                self._forward(token_B[:, None], place_B1, shared=self._shared)

    def keep(self, live_B: torch.Tensor) -> None:
        """Go on with these rows; the logits are the caller's to make anew."""
        self._cache.keep(live_B)
        self._choose(live_B)
        if self._shared is not None:
            self._shared.keep(live_B)

    def _choose(self, live_B: torch.Tensor) -> None:
        self._place_BT = self._place_BT[live_B]
        if self._mask_BT is not None:
            self._mask_BT = self._mask_BT[live_B]

    def _forward(self, ids_BT: torch.Tensor, place_BT: torch.Tensor, **options: SharedPrompts) -> None:
        mask_BT = None if self._mask_BT is None else self._mask_BT[:, : self._column]
        # The last column by mask, not by slice: a strided bf16 input makes the output head 1,000 times slower on CPUs.
        is_last_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        is_last_BT[:, -1] = True
        out = self._model(
            input_ids=ids_BT,
            position_ids=place_BT,
            attention_mask=mask_BT,
            past_key_values=self._cache.layers,
            use_cache=True,
            logits_to_keep=is_last_BT,
            **options,
        )
        self.logits_BV = out.logits.view(len(ids_BT), -1).contiguous()
        if self._tap is not None:
            self.fed_BD = self._tap.fed_BD


class _Sampler:
    """Gumbel-max by temperature alone; the noise of several positions is made at once where the vocabulary is small."""

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        temperature_B = torch.tensor([request.temperature for request in requests], device=device)
        self._seeds = [request.seed for request in requests]
        self._is_sampled_B1 = (temperature_B > 0)[:, None]
        self._divisor_B1 = torch.where(temperature_B > 0, temperature_B, 1.0)[:, None]
        self._is_greedy = not self._is_sampled_B1.any()
        self._first = 0
        self._noise_KBV: torch.Tensor | None = None
        self._rooms_2BV: torch.Tensor | None = None
        """For the noise of one position, and for scores with noise."""

    def pick(self, logits_BV: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token of each row and its log-probability at the sampling temperature (1 where greedy)."""
        score_BV = tempered(logits_BV, self._divisor_B1)
        if self._rooms_2BV is None:
            self._rooms_2BV = torch.empty(2, *score_BV.shape, device=score_BV.device)
        made_BV, room_BV = self._rooms_2BV[:, : len(score_BV)]
        if self._is_greedy:
            token_B = best(score_BV)
        else:
            token_B = best(torch.add(score_BV, self._noise(position, made_BV), out=room_BV))
        logp_B = score_BV.gather(-1, token_B[:, None])[:, 0] - log_sum_exp(score_BV, room_BV)
        return token_B, logp_B

    def keep(self, live_B: torch.Tensor) -> None:
        self._seeds = [self._seeds[row] for row in live_B.tolist()]
        self._is_sampled_B1, self._divisor_B1 = self._is_sampled_B1[live_B], self._divisor_B1[live_B]
        if self._noise_KBV is not None:
            self._noise_KBV = self._noise_KBV[:, live_B]

    def _noise(self, position: int, room_BV: torch.Tensor) -> torch.Tensor:
        """Noise of a position (B, V), 0 where a row is greedy; of one position at a time it is made in the room."""
        rows, vocab = room_BV.shape
        ahead = _NOISE_AHEAD // (rows * vocab)
        if ahead <= 1 and self._noise_KBV is None:
            noise_BV = gumbel(self._seeds, position, vocab, room_BV.device, out=room_BV)
            return silenced(noise_BV, self._is_sampled_B1)
        if self._noise_KBV is None or position >= self._first + len(self._noise_KBV):
            positions = [position + k for k in range(ahead) for _ in self._seeds]
            flat = gumbel(self._seeds * ahead, positions, vocab, room_BV.device)
            self._noise_KBV = silenced(flat.view(ahead, rows, vocab), self._is_sampled_B1)
            self._first = position
        return self._noise_KBV[position - self._first]


class _Record:
    """What each request has been answered so far, and which rows are still live."""

    def __init__(self, requests: Sequence[Request], eos_ids: frozenset[int], device: torch.device) -> None:
        horizon = max(request.budget for request in requests)
        self._ids_RT = torch.zeros(len(requests), horizon, dtype=torch.long, device=device)
        self._logp_RT = torch.zeros(len(requests), horizon, device=device)
        self._length_R = torch.zeros(len(requests), dtype=torch.long, device=device)
        self.row_B = torch.arange(len(requests), device=device)
        self._budget_B = torch.tensor([request.budget for request in requests], device=device)
        self._nearest = int(self._budget_B.min())
        self._eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)

    def add(self, token_B: torch.Tensor, logp_B: torch.Tensor, position: int) -> torch.Tensor | None:
        """Note one token per live row; returns the rows that go on, or None if all do."""
        self._ids_RT[self.row_B, position] = token_B
        self._logp_RT[self.row_B, position] = logp_B
        is_done_B = torch.isin(token_B, self._eos)
        if position + 1 >= self._nearest:
            is_done_B = is_done_B | (self._budget_B <= position + 1)
        if not is_done_B.any():
            return None
        self._length_R[self.row_B[is_done_B]] = position + 1
        return compacted(~is_done_B)

    def keep(self, live_B: torch.Tensor) -> None:
        self.row_B, self._budget_B = self.row_B[live_B], self._budget_B[live_B]
        self._nearest = int(self._budget_B.min())

    def completions(self, sketches: Sketches | None) -> list[Completion | None]:
        ids, logp = self._ids_RT.tolist(), self._logp_RT.tolist()
        shown = [b""] * len(ids) if sketches is None else sketches.packed()
        return [
            Completion(tuple(ids[row][:length]), tuple(logp[row][:length]), shown[row]) if length else None
            for row, length in enumerate(self._length_R.tolist())
        ]
