"""Replays given completions: one prefill, then the seeded pick at every position.

Completions of one prompt, as a group's are, stand behind it in one row (`numerics/packing.py`). Rows are padded on the
right, where nothing can be seen from the left.

Legend: B rows, T positions, K kept positions of all rows, N completion tokens of all items, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from farflung.engine.argmax import best, log_sum_exp, policy_scores, with_noise
from farflung.engine.base import Replay, Request
from farflung.engine.noise import gumbel
from farflung.numerics.devices import blocks
from farflung.numerics.packing import ROW_TOKENS, PackedRows, Text, Tree, rows_of, trees

REPLAY_TOKENS = 4096
"""Tokens that go through a model at once where nothing else is said."""
Item = tuple[Request, Sequence[int]]
Reading = Literal["shared", "padded", "alone"]
"""Completions of a prompt in one row, each in a row of its own, or one row at a time."""
Chunk = list[Tree]
"""Trees that go through the model at once, each a row."""


def _every(chunks: list[Chunk]) -> list[tuple[Chunk, bool]]:
    return [(chunk, True) for chunk in chunks]


def replay(
    model: PreTrainedModel,
    items: Sequence[Item],
    tokens_per_chunk: int,
    reading: Reading = "shared",
    deal: Callable[[list[Chunk]], list[tuple[Chunk, bool]]] = _every,
) -> list[Replay]:
    """Gap, margin, pick, lead and logp at each completion token of each item, in order.

    The `reading` that a model allows is found by `ways.py`. `deal` picks the chunks to read, and says which count;
    items of others come back as zeros. Raises ValueError for ids that the model does not have.
    """
    refuse_strangers(model, items)
    found = [Replay(*np.zeros((5, len(ids)), np.float32)) for _, ids in items]
    most_tokens = 0 if reading == "alone" else tokens_per_chunk
    most_scored = blocks(model.device).logits // model.config.get_text_config().vocab_size
    for chunk, counts in deal(list(_chunks(_trees(items, reading), most_tokens, most_scored))):
        members = [index for tree in chunk for index in tree.members]
        for index, part in zip(members, _replay_chunk(model, chunk, items, reading), strict=True):
            found[index] = part if counts else found[index]
    return found


def read(model: PreTrainedModel, items: Sequence[Item], reading: Reading) -> Iterator[tuple[int, torch.Tensor]]:
    """The logits (tokens, V) of some items as `replay` sees them, each with its place, in any order."""
    most_tokens = 0 if reading == "alone" else sum(len(request.prompt_ids) + len(ids) for request, ids in items) ** 2
    for chunk in _chunks(_trees(items, reading), most_tokens, blocks(model.device).logits):
        members = [index for tree in chunk for index in tree.members]
        logits_KV, which_N = _kept_logits(model, _rows(chunk, items), reading)
        yield from zip(members, logits_KV[which_N].split([len(items[index][1]) for index in members]), strict=True)


def refuse_strangers(model: PreTrainedModel, items: Sequence[Item]) -> None:
    """Raise ValueError for an item without a prompt, or with ids that the model does not have."""
    vocab = model.config.get_text_config().vocab_size
    for index, (request, ids) in enumerate(items):
        strangers = [token for token in (*request.prompt_ids, *ids) if not 0 <= token < vocab]
        if strangers or not request.prompt_ids:
            raise ValueError(f"item {index} has no prompt or token ids outside 0..{vocab - 1}: {strangers[:3]}")


def _trees(items: Sequence[Item], reading: Reading) -> list[Tree]:
    """Items that are not empty, those of one prompt together as far as `ROW_TOKENS` go; the widest trees first."""
    of_prompt: dict[tuple[int, ...], list[Text]] = {}
    for index, (request, ids) in enumerate(items):
        if ids:
            of_prompt.setdefault(request.prompt_ids, []).append((index, request.prompt_ids, ids))
    texts = (text for several in of_prompt.values() for text in several)
    return trees(texts, ROW_TOKENS if reading == "shared" else 0, are_long_joined=True)


def _chunks(found: Sequence[Tree], most_tokens: int, most_scored: int) -> Iterator[Chunk]:
    """Chunks as wide as their first tree, padding included."""
    chunk: Chunk = []
    for tree in found:
        is_full = chunk and chunk[0].width * (len(chunk) + 1) > most_tokens
        if is_full or sum(one.predicted for one in chunk) + tree.predicted > most_scored:
            if chunk:
                yield chunk
            chunk = []
        chunk.append(tree)
    if chunk:
        yield chunk


def _rows(chunk: Sequence[Tree], items: Sequence[Item]) -> PackedRows:
    return rows_of([[tree] for tree in chunk], {index: items[index][1] for tree in chunk for index in tree.members})


def _replay_chunk(
    model: PreTrainedModel, chunk: Sequence[Tree], items: Sequence[Item], reading: Reading
) -> list[Replay]:
    chosen = [items[index] for tree in chunk for index in tree.members]
    rows = _rows(chunk, items)
    logits_KV, which_N = _kept_logits(model, rows, reading)
    logits_NV = logits_KV if rows.is_plain else logits_KV[which_N]
    return views(logits_NV, chosen)


def _kept_logits(model: PreTrainedModel, rows: PackedRows, reading: Reading) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (K, V) after each prompt and after each token that has a successor, and which of them each token has (N,).

    The output head sees no others. A row that is read alone is read as plainly as can be, all its logits made.
    """
    ids_BT, (is_kept_BT, which_N) = rows.ids_RW.to(model.device), (one.to(model.device) for one in rows.predicting())
    if reading == "alone":
        return model(input_ids=ids_BT, use_cache=False).logits[is_kept_BT], which_N
    own = replace(rows, tree_RW=torch.zeros_like(rows.tree_RW))  # padding too sees the prompt: one tree is in each row
    out = model(
        ids_BT,
        attention_mask=None if rows.is_plain else own.mask().to(model.device),
        position_ids=None if rows.is_plain else rows.place_RW.to(model.device),
        use_cache=False,
        logits_to_keep=is_kept_BT,
    )
    return out.logits.view(-1, out.logits.shape[-1]), which_N


def views(logits_NV: torch.Tensor, items: Sequence[Item]) -> list[Replay]:
    """What each item's tokens look like under the logits before each of them, one item after the other."""
    sizes = [len(ids) for _, ids in items]
    seen_5N = _compare(logits_NV, items, sizes)
    return [Replay(*part_5R) for part_5R in np.split(seen_5N, np.cumsum(sizes)[:-1], axis=1)]


def _compare(logits_NV: torch.Tensor, items: Sequence[Item], sizes: Sequence[int]) -> np.ndarray:
    """Gap, margin, pick, lead and logp of every completion token, (5, N)."""
    token_N = torch.tensor([token for _, ids in items for token in ids], device=logits_NV.device)
    seed_N = np.repeat(np.array([request.seed for request, _ in items], np.uint64), sizes)
    first = [request.first_position for request, _ in items]
    position_N = np.concatenate([np.arange(at, at + size) for at, size in zip(first, sizes, strict=True)])
    temperature_N = np.repeat(np.array([request.temperature for request, _ in items], np.float32), sizes)
    seen_5N = torch.empty(5, len(token_N))
    height = max(1, blocks(logits_NV.device).scores // logits_NV.shape[1])
    for start in range(0, len(token_N), height):
        part = slice(start, start + height)
        seen_5N[:, part] = compare(logits_NV[part], token_N[part], seed_N[part], position_N[part], temperature_N[part])
    return seen_5N.numpy()


def compare(
    logits_NV: torch.Tensor, token_N: torch.Tensor, seed_N: np.ndarray, position_N: np.ndarray, t_N: np.ndarray
) -> torch.Tensor:
    """Gap, margin, pick, lead and logp (5, N) of tokens under `logits / T + noise`; without noise and T where T = 0."""
    policy_NV = policy_scores(logits_NV, t_N)
    noise_NV = gumbel(seed_N, position_N, logits_NV.shape[1], logits_NV.device)
    score_NV = with_noise(noise_NV, policy_NV, t_N)
    pick_N1 = best(score_NV)[:, None]
    first_N = score_NV.gather(-1, pick_N1)[:, 0]
    margin_N = first_N - score_NV.gather(-1, token_N[:, None])[:, 0]
    next_N1 = best(score_NV.scatter_(-1, pick_N1, -torch.inf))[:, None]
    second_N = score_NV.gather(-1, next_N1)[:, 0]
    of_N3 = policy_NV.gather(-1, torch.cat([token_N[:, None], pick_N1, next_N1], dim=-1))
    sent_N, best_N, next_N = (of_N3 - log_sum_exp(policy_NV, score_NV)[:, None]).unbind(-1)
    is_sampled_N = torch.from_numpy(t_N > 0).to(best_N.device)
    pick_N = torch.where(is_sampled_N, best_N.exp(), 1.0)
    return torch.stack([first_N - second_N, margin_N, pick_N, next_N - best_N, sent_N])
