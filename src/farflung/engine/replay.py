"""Replays somebody's completions: one right-padded prefill, then the seeded pick at every position.

Legend: B rows, T positions, N completion tokens of all rows, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from farflung.engine.base import Replay, Request
from farflung.engine.fingerprint import sketches, tapped
from farflung.engine.noise import gumbel

Item = tuple[Request, Sequence[int]]

_LOGITS_AT_ONCE = 1 << 26
"""Logits of one prefill (128 MiB in bf16); scored in float32 in slices of `_SCORES_AT_ONCE`."""
_SCORES_AT_ONCE = 1 << 20


def replay(model: PreTrainedModel, items: Sequence[Item], tokens_per_chunk: int) -> list[Replay]:
    """Gap and margin at each completion token of each item, in order. Rows are chunked by length, padding included.

    No attention mask is needed: what lies right of a position cannot reach it. Raises ValueError for ids that the
    model does not have.
    """
    vocab = model.config.get_text_config().vocab_size
    _refuse_strangers(items, vocab)
    found = [Replay(*np.zeros((3, 0), np.float32)) for _ in items]
    for chunk in _chunks(items, tokens_per_chunk, _LOGITS_AT_ONCE // vocab):
        for index, part in zip(chunk, _replay_chunk(model, [items[index] for index in chunk]), strict=True):
            found[index] = part
    return found


def _refuse_strangers(items: Sequence[Item], vocab: int) -> None:
    for index, (request, ids) in enumerate(items):
        strangers = [token for token in (*request.prompt_ids, *ids) if not 0 <= token < vocab]
        if strangers or not request.prompt_ids:
            raise ValueError(f"item {index} has no prompt or token ids outside 0..{vocab - 1}: {strangers[:3]}")


def _chunks(items: Sequence[Item], most_tokens: int, most_scored: int) -> Iterator[list[int]]:
    """Indices of items, longest first, so that a chunk is as wide as its first row."""

    def width(index: int) -> int:
        return len(items[index][0].prompt_ids) + len(items[index][1])

    chunk: list[int] = []
    scored = 0
    for index in sorted((i for i, (_, ids) in enumerate(items) if len(ids)), key=width, reverse=True):
        size = len(items[index][1])
        if chunk and (width(chunk[0]) * (len(chunk) + 1) > most_tokens or scored + size > most_scored):
            yield chunk
            chunk, scored = [], 0
        chunk.append(index)
        scored += size
    if chunk:
        yield chunk


def _replay_chunk(model: PreTrainedModel, items: Sequence[Item]) -> list[Replay]:
    requests, sizes = [request for request, _ in items], [len(ids) for _, ids in items]
    with tapped(model, requests) as tap:
        logits_NV = _completion_logits(model, items)
    found = [None] * len(items) if tap is None else sketches(tap.fed_BD, requests, sizes)
    seen_3N = _compare(logits_NV, items, sizes)
    parts = np.split(seen_3N, np.cumsum(sizes)[:-1], axis=1)
    return [Replay(*part_3R, sketch) for part_3R, sketch in zip(parts, found, strict=True)]


def _completion_logits(model: PreTrainedModel, items: Sequence[Item]) -> torch.Tensor:
    """Logits (N, V) of every completion token, row after row; the output head never sees the prompts."""
    width = max(len(request.prompt_ids) + len(ids) for request, ids in items) - 1
    ids_BT = torch.zeros(len(items), width, dtype=torch.long)
    is_kept_BT = torch.zeros(len(items), width, dtype=torch.bool)
    for row, (request, ids) in enumerate(items):
        fed = (*request.prompt_ids, *ids)[:-1]
        ids_BT[row, : len(fed)] = torch.tensor(fed)
        is_kept_BT[row, len(fed) - len(ids) : len(fed)] = True
    out = model(ids_BT.to(model.device), use_cache=False, logits_to_keep=is_kept_BT.to(model.device))
    return out.logits.view(-1, out.logits.shape[-1])


def _compare(logits_NV: torch.Tensor, items: Sequence[Item], sizes: Sequence[int]) -> np.ndarray:
    """Gap, margin and pick of every completion token, (3, N)."""
    token_N = torch.tensor([token for _, ids in items for token in ids], device=logits_NV.device)
    seed_N = np.repeat(np.array([request.seed & 0xFFFFFFFFFFFFFFFF for request, _ in items], np.uint64), sizes)
    position_N = np.concatenate([np.arange(size) for size in sizes])
    temperature_N = torch.tensor(np.repeat(np.array([r.temperature for r, _ in items], np.float32), sizes))
    temperature_N = temperature_N.to(logits_NV.device)
    seen_3N = torch.empty(3, len(token_N))
    height = max(1, _SCORES_AT_ONCE // logits_NV.shape[1])
    for start in range(0, len(token_N), height):
        part = slice(start, start + height)
        seen_3N[:, part] = look(logits_NV[part], token_N[part], seed_N[part], position_N[part], temperature_N[part])
    return seen_3N.numpy()


def look(
    logits_NV: torch.Tensor, token_N: torch.Tensor, seed_N: np.ndarray, position_N: np.ndarray, t_N: torch.Tensor
) -> torch.Tensor:
    """Gap, margin and pick (3, N) of tokens under `logits / T + noise`; under the logits themselves where T = 0."""
    is_sampled_N1 = (t_N > 0)[:, None]
    policy_NV = logits_NV.float() / torch.where(is_sampled_N1, t_N[:, None], 1.0)
    log_sum_N = policy_NV.logsumexp(dim=-1)
    score_NV = policy_NV + gumbel(seed_N, position_N, logits_NV.shape[1], logits_NV.device).mul_(is_sampled_N1)
    best_N2, pick_N2 = score_NV.topk(2, dim=-1)
    margin_N = best_N2[:, 0] - score_NV.gather(-1, token_N[:, None])[:, 0]
    pick_N = (policy_NV.gather(-1, pick_N2[:, :1])[:, 0] - log_sum_N).exp()
    return torch.stack([best_N2[:, 0] - best_N2[:, 1], margin_N, torch.where(t_N > 0, pick_N, 1.0)])
