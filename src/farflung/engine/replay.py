"""Replays somebody's completions: one prefill, then the seeded pick at every position.

Completions of one prompt, as a group's are, stand behind it in one row: the prompt is computed once, and an attention
mask keeps them from seeing each other. Rows are padded on the right, where nothing can be seen from the left.

Legend: B rows, T positions, K kept positions of all rows, N completion tokens of all items, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from farflung.engine.base import Replay, Request
from farflung.engine.choice import best, log_sum_exp, silenced, tempered
from farflung.engine.fingerprint import sketches, tapped
from farflung.engine.noise import gumbel

Item = tuple[Request, Sequence[int]]
Reading = Literal["shared", "padded", "alone"]
"""Completions of a prompt in one row, each in a row of its own, or one row at a time."""

_LOGITS_AT_ONCE = 1 << 26
"""Logits of one prefill (128 MiB in bf16); scored in float32 in slices of `_SCORES_AT_ONCE`."""
_SCORES_AT_ONCE = 1 << 20
_ROW_TOKENS = 512
"""Most tokens of a row that several completions share; attention to what is masked grows with its square."""
_WORTH_SHARING = 0.5
"""A prompt shorter than this share of the completion is computed anew for each: masked attention would cost more."""


class _Row(NamedTuple):
    """A prompt and the indices of the items whose completions follow it."""

    prompt_ids: tuple[int, ...]
    members: tuple[int, ...]
    width: int
    """Tokens that are fed: the last one of a completion predicts nothing."""
    scored: int


def replay(
    model: PreTrainedModel, items: Sequence[Item], tokens_per_chunk: int, reading: Reading = "shared"
) -> list[Replay]:
    """Gap, margin, pick, lead and logp at each completion token of each item, in order.

    What a model can do, `reading`, is found by `ways.py`. Raises ValueError for ids that the model does not have.
    """
    vocab = model.config.get_text_config().vocab_size
    _refuse_strangers(items, vocab)
    found = [Replay(*np.zeros((5, 0), np.float32)) for _ in items]
    most_tokens = 0 if reading == "alone" else tokens_per_chunk
    for chunk in _chunks(_rows(items, reading), most_tokens, _LOGITS_AT_ONCE // vocab):
        members = [index for row in chunk for index in row.members]
        for index, part in zip(members, _replay_chunk(model, chunk, items, reading), strict=True):
            found[index] = part
    return found


def read(model: PreTrainedModel, items: Sequence[Item], reading: Reading) -> Iterator[tuple[int, torch.Tensor]]:
    """The logits (tokens, V) of some items as `replay` sees them, each with its place, in any order."""
    most_tokens = 0 if reading == "alone" else sum(len(request.prompt_ids) + len(ids) for request, ids in items) ** 2
    for chunk in _chunks(_rows(items, reading), most_tokens, _LOGITS_AT_ONCE):
        members = [index for row in chunk for index in row.members]
        logits_NV = _kept_logits(model, chunk, items, reading)[_predictors(chunk, items)]
        yield from zip(members, logits_NV.split([len(items[index][1]) for index in members]), strict=True)


def _refuse_strangers(items: Sequence[Item], vocab: int) -> None:
    for index, (request, ids) in enumerate(items):
        strangers = [token for token in (*request.prompt_ids, *ids) if not 0 <= token < vocab]
        if strangers or not request.prompt_ids:
            raise ValueError(f"item {index} has no prompt or token ids outside 0..{vocab - 1}: {strangers[:3]}")


def _rows(items: Sequence[Item], reading: Reading) -> list[_Row]:
    """Items that are not empty, those of one prompt together as far as `_ROW_TOKENS` go; the widest rows first."""
    rows: dict[tuple[int, ...], list[_Row]] = {}
    for index, (request, ids) in enumerate(items):
        if ids:
            of_prompt = rows.setdefault(request.prompt_ids, [])
            is_worth = reading == "shared" and len(request.prompt_ids) >= _WORTH_SHARING * len(ids)
            if is_worth and of_prompt and of_prompt[-1].width + len(ids) - 1 <= _ROW_TOKENS:
                last = of_prompt[-1]
                of_prompt[-1] = _Row(
                    last.prompt_ids, (*last.members, index), last.width + len(ids) - 1, last.scored + len(ids)
                )
            else:
                of_prompt.append(_Row(request.prompt_ids, (index,), len(request.prompt_ids) + len(ids) - 1, len(ids)))
    return sorted((row for several in rows.values() for row in several), key=lambda row: -row.width)


def _chunks(rows: Sequence[_Row], most_tokens: int, most_scored: int) -> Iterator[list[_Row]]:
    """Rows that go through the model at once; a chunk is as wide as its first row, padding included."""
    chunk: list[_Row] = []
    for row in rows:
        is_full = chunk and chunk[0].width * (len(chunk) + 1) > most_tokens
        if is_full or sum(one.scored for one in chunk) + row.scored > most_scored:
            if chunk:
                yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk


def _replay_chunk(
    model: PreTrainedModel, rows: Sequence[_Row], items: Sequence[Item], reading: Reading
) -> list[Replay]:
    chosen = [items[index] for row in rows for index in row.members]
    requests, sizes = [request for request, _ in chosen], [len(ids) for _, ids in chosen]
    with tapped(model, requests) as tap:
        logits_KV = _kept_logits(model, rows, items, reading)
    predictor_N = torch.tensor(_predictors(rows, items), device=logits_KV.device)
    is_shared = len(rows) < len(chosen)
    logits_NV = logits_KV[predictor_N] if is_shared else logits_KV
    fed_KD = None if tap is None else tap.fed_BD[-len(logits_KV) :]  # a row read alone has its prompt before them
    found = [None] * len(chosen) if fed_KD is None else sketches(fed_KD[predictor_N], requests, sizes)
    seen_5N = _compare(logits_NV, chosen, sizes)
    parts = np.split(seen_5N, np.cumsum(sizes)[:-1], axis=1)
    return [Replay(*part_5R, sketch) for part_5R, sketch in zip(parts, found, strict=True)]


def _kept_logits(model: PreTrainedModel, rows: Sequence[_Row], items: Sequence[Item], reading: Reading) -> torch.Tensor:
    """Logits (K, V) after each prompt and after each token that has a successor; the output head sees no others.

    A row that is read alone is read as plainly as can be, all its logits made.
    """
    width = rows[0].width
    ids_BT, place_BT = torch.zeros(2, len(rows), width, dtype=torch.long)
    owner_BT = torch.full((len(rows), width), -1)  # which completion a position belongs to; -1 for prompt and padding
    is_kept_BT = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        _lay(row, items, ids_BT[b], place_BT[b], owner_BT[b])
        is_kept_BT[b, len(row.prompt_ids) - 1 : row.width] = True
    if reading == "alone":
        return model(input_ids=ids_BT.to(model.device), use_cache=False).logits[is_kept_BT.to(model.device)]
    is_shared = any(len(row.members) > 1 for row in rows)
    out = model(
        ids_BT.to(model.device),
        attention_mask=_mask(owner_BT, [len(row.prompt_ids) for row in rows]).to(model.device) if is_shared else None,
        position_ids=place_BT.to(model.device) if is_shared else None,
        use_cache=False,
        logits_to_keep=is_kept_BT.to(model.device),
    )
    return out.logits.view(-1, out.logits.shape[-1])


def _lay(row: _Row, items: Sequence[Item], ids_T: torch.Tensor, place_T: torch.Tensor, owner_T: torch.Tensor) -> None:
    """Write a row: its prompt, then each completion but for its last token, numbered as if it stood there alone."""
    start = len(row.prompt_ids)
    ids_T[:start], place_T[:start] = torch.tensor(row.prompt_ids), torch.arange(start)
    at = start
    for index in row.members:
        fed = list(items[index][1][:-1])
        part = slice(at, at + len(fed))
        ids_T[part] = torch.tensor(fed, dtype=torch.long)
        place_T[part] = torch.arange(start, start + len(fed))
        owner_T[part] = index
        at = part.stop


def _mask(owner_BT: torch.Tensor, prompts: Sequence[int]) -> torch.Tensor:
    """Who sees whom, (B, 1, T, T): the prompt, and of one's own completion what came before; padding sees itself."""
    column_T = torch.arange(owner_BT.shape[1])
    is_prompt_BT = column_T < torch.tensor(prompts)[:, None]
    is_own_BTT = owner_BT[:, :, None] == owner_BT[:, None, :]
    return ((is_prompt_BT[:, None, :] | is_own_BTT) & (column_T <= column_T[:, None]))[:, None]


def _predictors(rows: Sequence[_Row], items: Sequence[Item]) -> list[int]:
    """Which of the kept positions predicts each completion token; the prompt's last predicts every first one."""
    found: list[int] = []
    base = 0
    for row in rows:
        at = base
        for index in row.members:
            size = len(items[index][1])
            found += [base, *range(at + 1, at + size)]
            at += size - 1
        base = at + 1
    return found


def _compare(logits_NV: torch.Tensor, items: Sequence[Item], sizes: Sequence[int]) -> np.ndarray:
    """Gap, margin, pick, lead and logp of every completion token, (5, N)."""
    token_N = torch.tensor([token for _, ids in items for token in ids], device=logits_NV.device)
    seed_N = np.repeat(np.array([request.seed & 0xFFFFFFFFFFFFFFFF for request, _ in items], np.uint64), sizes)
    position_N = np.concatenate([np.arange(size) for size in sizes])
    temperature_N = torch.tensor(np.repeat(np.array([r.temperature for r, _ in items], np.float32), sizes))
    temperature_N = temperature_N.to(logits_NV.device)
    seen_5N = torch.empty(5, len(token_N))
    height = max(1, _SCORES_AT_ONCE // logits_NV.shape[1])
    for start in range(0, len(token_N), height):
        part = slice(start, start + height)
        seen_5N[:, part] = look(logits_NV[part], token_N[part], seed_N[part], position_N[part], temperature_N[part])
    return seen_5N.numpy()


def look(
    logits_NV: torch.Tensor, token_N: torch.Tensor, seed_N: np.ndarray, position_N: np.ndarray, t_N: torch.Tensor
) -> torch.Tensor:
    """Gap, margin, pick, lead and logp (5, N) of tokens under `logits / T + noise`; without noise and T where T = 0."""
    is_sampled_N1 = (t_N > 0)[:, None]
    policy_NV = tempered(logits_NV, torch.where(is_sampled_N1, t_N[:, None], 1.0))
    noise_NV = gumbel(seed_N, position_N, logits_NV.shape[1], logits_NV.device)
    score_NV = silenced(noise_NV, is_sampled_N1).add_(policy_NV)
    pick_N1 = best(score_NV)[:, None]
    first_N = score_NV.gather(-1, pick_N1)[:, 0]
    margin_N = first_N - score_NV.gather(-1, token_N[:, None])[:, 0]
    next_N1 = best(score_NV.scatter_(-1, pick_N1, -torch.inf))[:, None]
    second_N = score_NV.gather(-1, next_N1)[:, 0]
    of_N3 = policy_NV.gather(-1, torch.cat([token_N[:, None], pick_N1, next_N1], dim=-1))
    sent_N, best_N, next_N = (of_N3 - log_sum_exp(policy_NV, score_NV)[:, None]).unbind(-1)
    pick_N = torch.where(t_N > 0, best_N.exp(), 1.0)
    return torch.stack([first_N - second_N, margin_N, pick_N, next_N - best_N, sent_N])
