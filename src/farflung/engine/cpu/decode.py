"""The decode loop: requests through one Hugging Face causal LM with a KV cache and seeded noise, batched continuously.

Legend: R requests, B live rows, T positions, V vocabulary, K positions of noise made ahead.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from farflung.engine.argmax import best, policy_scores, silenced
from farflung.engine.base import Completion, Request
from farflung.engine.cpu.attention import is_worth_sharing
from farflung.engine.cpu.kv_cache import compacted
from farflung.engine.cpu.rows import DecodeBatch
from farflung.engine.noise import exponential
from farflung.engine.plain import Batching, batches
from farflung.protocol.stops import DONE, Stops

_PATIENCE, _FEW = 2, 64
"""Requests join once slots have been idle for as much as so many steps of the whole batch, fewer where it is small."""
_NOISE_AHEAD = 1 << 16
"""Noise values made at once. For a vocabulary of 32, 32 positions at a time cost 12 us each instead of 100."""


def decode(
    model: PreTrainedModel,
    requests: Sequence[Request],
    eos_ids: frozenset[int],
    should_stop: Callable[[], bool] | None = None,
    is_plain: bool = False,
    slots: int = 64,
    batching: Batching = "padded",
    stops: Stops | None = None,
) -> list[Completion | None]:
    """Complete all requests, `slots` at a time: as rows end, others join. None for those that `should_stop` left out.

    Each token is argmax(logits / T + Gumbel noise), or argmax(logits) where T = 0; finished rows leave the batch.
    The longest prompts come first. The `is_plain` and `batching` that a model allows are found by `ways.py`.
    """
    found: list[Completion | None] = [None] * len(requests)
    for batch in batches(requests, batching, slots):
        done = _complete(model, [requests[index] for index in batch], eos_ids, should_stop, is_plain, slots, stops)
        for index, completion in zip(batch, done, strict=True):
            found[index] = completion
    return found


def _complete(
    model: PreTrainedModel,
    requests: Sequence[Request],
    eos_ids: frozenset[int],
    should_stop: Callable[[], bool] | None,
    is_plain: bool,
    slots: int,
    stops: Stops | None,
) -> list[Completion | None]:
    prompts = {request.prompt_ids for request in requests}
    is_shared = is_plain and is_worth_sharing(list(prompts), len(requests))
    horizon = max(map(len, prompts)) + max(request.max_new_tokens for request in requests)
    rows = DecodeBatch(model, horizon, is_plain=is_plain, is_shared=is_shared)
    return _decode(rows, requests, eos_ids, should_stop, slots, stops)


def _decode(
    rows: DecodeBatch,
    requests: Sequence[Request],
    eos_ids: frozenset[int],
    should_stop: Callable[[], bool] | None,
    slots: int,
    stops: Stops | None,
) -> list[Completion | None]:
    record = _Record(requests, _Ending(eos_ids, stops, rows.device), rows.device)
    sampler, joined, idle = _Sampler(), 0, 0
    while not (should_stop is not None and should_stop()):
        idle += slots - len(rows)
        if count := _joining(rows, slots, len(requests) - joined, idle):
            fresh = requests[joined : joined + count]
            rows.join(fresh)
            sampler.join(fresh)
            record.join(range(joined, joined + count))
            joined, idle = joined + count, 0
        if not len(rows):
            break
        token_B, logp_B = sampler.pick(rows.logits_BV, record.position_B)
        live_B = record.add(token_B, logp_B)
        if live_B is not None:
            token_B = token_B[live_B]
            for part in (rows, sampler, record):
                part.keep(live_B)
        if len(rows):
            rows.advance(token_B)
    return record.completions()


def _joining(rows: DecodeBatch, slots: int, waiting: int, idle: int) -> int:
    """How many requests join now: several at once, for to read a prompt takes as long as a token of half a batch.

    `idle` counts each free slot once a step, so that the longer completions are, the sooner they are followed. No free
    slot waits for more requests than are left.
    """
    patience = slots * min(slots, _FEW) * _PATIENCE // _FEW
    free = min(slots - len(rows), waiting) if rows.may_grow else 0
    return free if not len(rows) or free == waiting or idle >= patience else 0


class _Sampler:
    """Gumbel-max by temperature alone, as argmax(softmax(logits / T) / exp(-noise)): that gives log-probabilities too.

    The noise of several positions is made at once where the vocabulary is small.
    """

    def __init__(self) -> None:
        self._seeds: list[int] = []
        self._first_B = torch.empty(0, dtype=torch.long)
        """The position of each row's first token."""
        self._temperature_B = np.empty(0, np.float32)
        self._noise_KBV: torch.Tensor | None = None
        self._used = 0
        """Positions of the noise made ahead that were picked from."""
        self._buffers_2BV: torch.Tensor | None = None
        """For the noise of one position and scores with noise, and for probabilities."""

    def join(self, requests: Sequence[Request]) -> None:
        """Rows of these requests come behind those that are here."""
        self._seeds = [*self._seeds, *(request.seed for request in requests)]
        first = torch.tensor([request.first_position for request in requests])
        self._first_B = torch.cat([self._first_B, first])
        temperatures = np.array([request.temperature for request in requests], np.float32)
        self._temperature_B, self._noise_KBV = np.concatenate([self._temperature_B, temperatures]), None

    def pick(self, logits_BV: torch.Tensor, said_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The token of each row that comes after `said_B` ones, and its log-probability (1 where greedy)."""
        score_BV = policy_scores(logits_BV, self._temperature_B)
        if self._buffers_2BV is None or self._buffers_2BV.shape[1] < len(score_BV):
            self._buffers_2BV = torch.empty(2, *score_BV.shape, device=score_BV.device)
        made_BV, buffer_BV = self._buffers_2BV[:, : len(score_BV)]
        chance_BV = torch.softmax(score_BV, -1, out=buffer_BV)
        if (self._temperature_B > 0).any():
            score_BV = torch.div(chance_BV, self._noise(self._first_B + said_B, made_BV), out=made_BV)
        token_B = best(score_BV)
        return token_B, chance_BV.gather(-1, token_B[:, None])[:, 0].log()

    def keep(self, live_B: torch.Tensor) -> None:
        live = live_B.tolist()
        self._seeds, self._temperature_B = [self._seeds[row] for row in live], self._temperature_B[live]
        self._first_B = self._first_B[live_B]
        if self._noise_KBV is not None:
            self._noise_KBV = self._noise_KBV[:, live_B]

    def _noise(self, position_B: torch.Tensor, buffer_BV: torch.Tensor) -> torch.Tensor:
        """exp(-noise) of each row's position (B, V), 1 where a row is greedy; of one at a time it is in the room."""
        rows, vocab = buffer_BV.shape
        ahead = _NOISE_AHEAD // (rows * vocab)
        if ahead <= 1 and self._noise_KBV is None:
            noise_BV = exponential(self._seeds, position_B, vocab, buffer_BV.device, out=buffer_BV)
            return silenced(noise_BV, self._temperature_B)
        if self._noise_KBV is None or self._used == len(self._noise_KBV):
            position_KB = position_B + torch.arange(ahead, device=position_B.device)[:, None]
            flat = exponential(self._seeds * ahead, position_KB.flatten(), vocab, buffer_BV.device)
            self._noise_KBV, self._used = silenced(flat.view(ahead, rows, vocab), self._temperature_B), 0
        self._used += 1
        return self._noise_KBV[self._used - 1]


class _Ending:
    """Which rows end: with an end token, or with the token that completes a stop string."""

    def __init__(self, eos_ids: frozenset[int], stops: Stops | None, device: torch.device) -> None:
        self._eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
        self._moves_SV = None if stops is None else torch.tensor(stops.moves_SV, device=device)
        self._state_B = torch.empty(0, dtype=torch.long, device=device)

    def join(self, count: int) -> None:
        self._state_B = torch.cat([self._state_B, self._state_B.new_zeros(count)])

    def add(self, token_B: torch.Tensor) -> torch.Tensor:
        """Whether each row ends with its token."""
        is_done_B = torch.isin(token_B, self._eos)
        if self._moves_SV is None:
            return is_done_B
        self._state_B = self._moves_SV[self._state_B, token_B].long()
        return is_done_B | (self._state_B == DONE)

    def keep(self, live_B: torch.Tensor) -> None:
        self._state_B = self._state_B[live_B]


class _Record:
    """Each request's answer so far, and the rows that are still live."""

    def __init__(self, requests: Sequence[Request], ending: "_Ending", device: torch.device) -> None:
        horizon = max(request.max_new_tokens for request in requests)
        self._ids_RT = torch.zeros(len(requests), horizon, dtype=torch.long, device=device)
        self._logp_RT = torch.zeros(len(requests), horizon, device=device)
        self._length_R = torch.zeros(len(requests), dtype=torch.long, device=device)
        self._max_new_tokens_R = torch.tensor([request.max_new_tokens for request in requests], device=device)
        self.row_B = self.position_B = torch.empty(0, dtype=torch.long, device=device)
        self._ending = ending

    def join(self, fresh: range) -> None:
        """These requests are live too."""
        more = torch.arange(fresh.start, fresh.stop, device=self.row_B.device)
        self.row_B = torch.cat([self.row_B, more])
        self.position_B = torch.cat([self.position_B, torch.zeros_like(more)])
        self._ending.join(len(fresh))

    def add(self, token_B: torch.Tensor, logp_B: torch.Tensor) -> torch.Tensor | None:
        """Note one token per live row; returns the rows that go on, or None if all do."""
        self._ids_RT[self.row_B, self.position_B] = token_B
        self._logp_RT[self.row_B, self.position_B] = logp_B
        self.position_B = self.position_B + 1
        is_done_B = self._ending.add(token_B) | (self.position_B >= self._max_new_tokens_R[self.row_B])
        if not is_done_B.any():
            return None
        self._length_R[self.row_B[is_done_B]] = self.position_B[is_done_B]
        return compacted(~is_done_B)

    def keep(self, live_B: torch.Tensor) -> None:
        self.row_B, self.position_B = self.row_B[live_B], self.position_B[live_B]
        self._ending.keep(live_B)

    def completions(self) -> list[Completion | None]:
        ids, logp = self._ids_RT.tolist(), self._logp_RT.tolist()
        return [
            Completion(tuple(ids[row][:length]), tuple(logp[row][:length])) if length else None
            for row, length in enumerate(self._length_R.tolist())
        ]
