"""A cache of keys and values with room for what is to come: a token is written in place, a finished row costs nothing.

A growing cache copies itself with every token and with every row that leaves. Here a token goes into room that was
taken before, a row that leaves is overwritten by the last one, and one that joins takes its place. Layers of other
kinds (sliding windows, recurrent states) are left as transformers makes them.

Legend: B rows, H heads, T positions, D size of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

_LEAST_SPARE = 64
"""Positions that are taken at once at least; more as a row grows longer."""


class PreallocatedCache:
    """The cache of one decoding batch."""

    def __init__(self, model: PreTrainedModel, horizon: int, held_in: torch.dtype | None = None) -> None:
        """`horizon` is the most positions that a row may come to; keys and values are held in another type if asked."""
        self.layers, self._args = DynamicCache(config=model.config), (horizon, held_in)
        found = self.layers.layers
        self.layers.layers = [
            _PreallocatedLayer(*self._args) if type(layer) is DynamicLayer else layer for layer in found
        ]

    @property
    def is_plain(self) -> bool:
        """Whether the model remembers keys and values of all positions and nothing else."""
        return all(type(layer) is _PreallocatedLayer for layer in self.layers.layers)

    def take(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer, which the cache holds no more. Raises ValueError for layers of other kinds."""
        if not self.is_plain:
            raise ValueError("this model remembers more than keys and values of all positions")
        found = [(layer.keys, layer.values) for layer in self.layers.layers]
        self.layers.layers = [_PreallocatedLayer(*self._args) for _ in found]
        return found

    def spread(self, asked_B: torch.Tensor) -> None:
        """Make a row of each of these, some perhaps more than once."""
        for layer in self.layers.layers:
            layer.reorder_cache(asked_B)

    def keep(self, live_B: torch.Tensor) -> None:
        """Go on with these rows, each at most once; those that stay in their place cost nothing (see `compacted`)."""
        for layer in self.layers.layers:
            if isinstance(layer, _PreallocatedLayer):
                layer.keep(live_B)
            else:
                layer.reorder_cache(live_B)

    def add(self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """More rows behind those that are here, whose keys and values (B, H, T, D) end in the last column."""
        for layer, (keys, values) in zip(self.layers.layers, layers, strict=True):
            layer.add(keys, values)

    def add_empty(self, count: int) -> None:
        """So many more rows, which have nothing yet."""
        for layer in self.layers.layers:
            layer.add(*(held.new_empty(count, held.shape[1], 0, held.shape[3]) for held in (layer.keys, layer.values)))

    def forget(self, count: int) -> None:
        """Leave out the first columns of all rows."""
        for layer in self.layers.layers:
            layer.forget(count)


def compacted(is_live_B: torch.Tensor) -> torch.Tensor:
    """The live rows, in an order that leaves all in their place but the last ones, which fill the gaps."""
    live = is_live_B.nonzero()[:, 0]
    order = torch.arange(len(live), device=live.device)
    order[~is_live_B[: len(live)]] = live[live >= len(live)]
    return order


class _PreallocatedLayer(DynamicLayer):
    """`keys` and `values` (B, H, T, D) are views of wider tensors once the prompts are read."""

    def __init__(self, horizon: int, held_in: torch.dtype | None) -> None:
        super().__init__()
        self._horizon, self._held_in = horizon, held_in
        self._buffers: list[torch.Tensor] = []
        self._first = 0
        """Where the views begin in the wider tensors; forgotten columns are on their left."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Write what is fed behind what is there; gives all of it, the first time as it came."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = self._held_in or key_states.dtype, key_states.device, True
            self.keys, self.values = key_states.to(self.dtype), value_states.to(self.dtype)
            return key_states, value_states
        rows, used, stop = len(key_states), self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        self._reserve(rows, stop)
        for buffer, fed in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, self._first + used : self._first + stop] = fed
        self._show(rows, stop)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Any rows in any order, by a copy."""
        self.keys, self.values = self.keys[beam_idx], self.values[beam_idx]
        self._buffers, self._first = [], 0

    def keep(self, live_B: torch.Tensor) -> None:
        """Rows that are all different and move towards the front, in place."""
        if not self.is_initialized:
            return
        if not self._buffers:
            self.reorder_cache(live_B)
            return
        gap_B = (live_B != torch.arange(len(live_B), device=live_B.device)).nonzero()[:, 0]
        for held in (self.keys, self.values) if len(gap_B) else ():
            held[gap_B] = held[live_B[gap_B]]
        self._show(len(live_B), self.keys.shape[2])

    def add(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Rows that end in the last column; before their first one they hold zeros, for masked rubbish may be NaN."""
        before, rows, used = len(self.keys), len(self.keys) + len(keys), self.keys.shape[2]
        self._reserve(rows, used)
        self._show(rows, used)
        for held, new in zip((self.keys, self.values), (keys, values), strict=True):
            held[before:, :, : used - new.shape[2]] = 0
            held[before:, :, used - new.shape[2] :] = new

    def forget(self, count: int) -> None:
        """Show no more of the first columns."""
        self._reserve(len(self.keys), self.keys.shape[2])
        self._first += count
        self._show(len(self.keys), self.keys.shape[2] - count)

    def _reserve(self, rows: int, columns: int) -> None:
        """Have wide tensors that hold so much from where the views begin; forgotten parts are not taken along."""
        if self._buffers and rows <= len(self._buffers[0]) and self._first + columns <= self._buffers[0].shape[2]:
            return
        least = columns + (_LEAST_SPARE if self._first else 0)
        width = max(least, min(self._horizon, max(2 * columns, columns + _LEAST_SPARE)))
        most = max([rows, *map(len, self._buffers)])
        self._buffers, self._first = [], 0
        for held in (self.keys, self.values):
            buffer = held.new_empty(most, held.shape[1], width, held.shape[3])
            buffer[: len(held), :, : held.shape[2]] = held
            self._buffers.append(buffer)

    def _show(self, rows: int, used: int) -> None:
        self.keys, self.values = (buffer[:rows, :, self._first : self._first + used] for buffer in self._buffers)
