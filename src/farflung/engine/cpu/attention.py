"""Attention of a decoding batch: one token a row by plain products, and a prompt that rows share read once for all.

The usual kernels are made for many queries. With one a row, whose heads ask three at a time for the same keys, two
products of matrices take a third to two thirds of their time, in float32 a tenth of it in bfloat16 (64 rows, 57
positions: 0.15 instead of 0.31 and 2.5 ms a layer of SmolLM2); so keys and values are held in float32.

Where prompts are shared a token's attention is taken in two parts, to its own row and, together with the others of its
group, to their prompt; what each part found counts by its share of the sum under the softmax, which is how blocks of
flash attention are put together (Dao et al. 2022).

Legend: B rows, G prompts, S slots of a group (rows of the largest), H heads of queries, K heads of keys, T positions, D
size of a head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, PreTrainedModel

Layer = tuple[torch.Tensor, torch.Tensor]
"""Keys and values (B, K, T, D)."""
HELD_IN = torch.float32
"""The type of keys and values that are held for such attention."""
LEAST_PROMPT, LEAST_ROWS = 32, 3
"""Positions of the longest prompt, and rows to a prompt, from which on it pays to share it."""
_NAME = "farflung-decoding"
_BENDS = ("softcap", "sliding_window", "s_aux", "position_bias")
"""Arguments that ask for other attention; there is no such thing here."""


class SharedPrompts:
    """The prompts of a batch and which row has which."""

    def __init__(self, layers: Sequence[Layer], group_B: torch.Tensor, seen_GT: torch.Tensor) -> None:
        """Keys and values (G, K, T, D) of each layer; `seen_GT` is false where a prompt is padded."""
        self._hold(layers, group_B, seen_GT)

    def used(self) -> set[int]:
        """The prompts that rows have."""
        return set(self._group_B.tolist())

    def keep_prompts(self, kept: list[int]) -> None:
        """Go on with these prompts, in rising order, all that rows have among them."""
        if len(kept) < len(self._seen_GT):
            first = int(self._seen_GT[kept].any(0).int().argmax())  # before it all that stay are padded
            held = [(keys[kept, :, first:], values[kept, :, first:]) for keys, values in self._layers]
            group_B = torch.searchsorted(torch.tensor(kept), self._group_B)
            self._hold(held, group_B, self._seen_GT[kept, first:])

    def add_prompts(self, layers: Sequence[Layer], seen_GT: torch.Tensor) -> None:
        """More prompts behind those that are here."""
        held = [
            (_stacked(keys, more_keys, -2), _stacked(values, more_values, -2))
            for (keys, values), (more_keys, more_values) in zip(self._layers, layers, strict=True)
        ]
        self._hold(held, self._group_B, _stacked(self._seen_GT, seen_GT, -1))

    def add(self, group_B: torch.Tensor) -> None:
        """More rows behind those that are here, with these prompts."""
        self._slot(torch.cat([self._group_B, group_B]))

    def _hold(self, layers: Sequence[Layer], group_B: torch.Tensor, seen_GT: torch.Tensor) -> None:
        # As the model makes them they would be copied for every token: the heads of a position stand side by side.
        self._layers = [(keys.contiguous(), values.contiguous()) for keys, values in layers]
        self._seen_GT = seen_GT
        self._mask_G11T = None if seen_GT.all() else masked(~seen_GT)
        self._slot(group_B)

    def keep(self, live_B: torch.Tensor) -> None:
        """Go on with these rows."""
        self._slot(self._group_B[live_B])

    def _slot(self, group_B: torch.Tensor) -> None:
        """Give each row a slot in its group; slots that stay empty ask what row 0 asks, and the answer is not read."""
        self._group_B = group_B
        count_G = group_B.bincount(minlength=len(self._layers[0][0]))
        order_B, self._slots = group_B.argsort(stable=True), int(count_G.max())
        slot_B = torch.empty_like(group_B)
        slot_B[order_B] = torch.arange(len(group_B)) - (count_G.cumsum(0) - count_G)[group_B[order_B]]
        self._place_B = group_B * self._slots + slot_B
        self._row_N = torch.zeros(len(count_G) * self._slots, dtype=torch.long)
        self._row_N[self._place_B] = torch.arange(len(group_B))

    def answer(self, layer: int, query_BHD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's answer from its prompt (B, H, D), and the log of its sum under the softmax (B, H)."""
        query_GHSD = query_BHD.index_select(0, self._row_N).unflatten(0, (-1, self._slots)).transpose(1, 2)
        keys, values = self._layers[layer]
        found_GHSD, log_sum_GHS = _products(query_GHSD, keys, values, self._mask_G11T)
        return self._by_row(found_GHSD), self._by_row(log_sum_GHS)

    def _by_row(self, seen: torch.Tensor) -> torch.Tensor:
        """From (G, H, S, …) to (B, H, …)."""
        return seen.transpose(1, 2).flatten(0, 1).index_select(0, self._place_B)


def _stacked(one: torch.Tensor, other: torch.Tensor, dim: int) -> torch.Tensor:
    """Both along the first dimension; in another one the shorter of them begins with zeros."""
    width = max(one.shape[dim], other.shape[dim])
    return torch.cat([_begun(one, width, dim), _begun(other, width, dim)])


def _begun(held: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    shape = list(held.shape)
    shape[dim] = width - shape[dim]
    return torch.cat([held.new_zeros(shape), held], dim) if shape[dim] else held


def is_worth_sharing(prompts: Sequence[Sequence[int]], rows: int) -> bool:
    """Whether rows with these different prompts are decoded faster so."""
    return max(map(len, prompts)) >= LEAST_PROMPT and rows >= LEAST_ROWS * len(prompts)


class Held(NamedTuple):
    """The state of rows beside their own keys and values."""

    mask_B11T: torch.Tensor | None
    """The term that is added to the scores of a row's own part, if any."""
    prompts: SharedPrompts | None


def masked(hidden_BT: torch.Tensor) -> torch.Tensor:
    """The scores' mask (B, 1, 1, T) of positions that do not count."""
    return torch.zeros(hidden_BT.shape).masked_fill_(hidden_BT, -torch.inf)[:, None, None]


@contextmanager
def attending(model: PreTrainedModel) -> Iterator[None]:
    """For as long as this lasts, attention is `_attend`: the model is to be given `held`."""
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    held: Held | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one token (B, H, 1, D) to its own row and to its prompt. Raises ValueError where it cannot be so."""
    if held is None or query.shape[2] != 1 or any(options.get(name) is not None for name in _BENDS):
        raise ValueError("this attention takes one token a row and no windows, caps or sinks")
    query_BH1D = query.to(HELD_IN) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    own = key.to(HELD_IN), value.to(HELD_IN)  # a row's first keys come as the model makes them
    found_BH1D, own_sum_BH1 = _products(query_BH1D, *own, held.mask_B11T)
    if held.prompts is not None:
        found_BHD, found_sum_BH = held.prompts.answer(int(module.layer_idx), query_BH1D[:, :, 0])
        share_BH11 = torch.sigmoid(found_sum_BH[:, :, None] - own_sum_BH1)[..., None]
        found_BH1D = torch.lerp(found_BH1D, found_BHD[:, :, None], share_BH11)
    return found_BH1D.transpose(1, 2).to(query.dtype).contiguous(), None


def _products(
    query_BHSD: torch.Tensor,
    keys_BKTD: torch.Tensor,
    values_BKTD: torch.Tensor,
    mask_B11T: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each query's answer (B, H, S, D), and the log of its sum under the softmax (B, H, S)."""
    shape = query_BHSD.shape
    folded_BKND = query_BHSD.reshape(shape[0], keys_BKTD.shape[1], -1, shape[-1])  # all that ask the same keys
    score_BKNT = torch.matmul(folded_BKND, keys_BKTD.transpose(-1, -2))
    if mask_B11T is not None:
        score_BKNT += mask_B11T
    top_BKN1 = score_BKNT.amax(-1, keepdim=True)
    weight_BKNT = score_BKNT.sub_(top_BKN1).exp_()
    sum_BKN1 = weight_BKNT.sum(-1, keepdim=True)
    found_BKND = torch.matmul(weight_BKNT, values_BKTD).div_(sum_BKN1)
    return found_BKND.view(shape), sum_BKN1.log_().add_(top_BKN1).view(shape[:-1])


AttentionInterface.register(_NAME, _attend)
