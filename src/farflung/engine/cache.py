"""A cache of keys and values with room for what is to come: a token is written in place, a finished row costs nothing.

A growing cache copies itself with every token and with every row that leaves. Here a token goes into room that was
taken before, and a row that leaves is overwritten by the last one. Layers of other kinds (sliding windows, recurrent
states) are left as transformers makes them.

Legend: B rows, H heads, T positions, D size of a head.
"""

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

_LEAST_ROOM = 64
"""Positions that are taken at once at least; more as a row grows longer."""


class RoomyCache:
    """The cache of one decoding batch."""

    def __init__(self, model: PreTrainedModel, horizon: int) -> None:
        """`horizon` is the most positions that a row may come to."""
        self.layers, self._horizon = DynamicCache(config=model.config), horizon
        found = self.layers.layers
        self.layers.layers = [_RoomyLayer(horizon) if type(layer) is DynamicLayer else layer for layer in found]

    def take(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer, which the cache holds no more. Raises ValueError for layers of other kinds."""
        found = [(layer.keys, layer.values) for layer in self.layers.layers if type(layer) is _RoomyLayer]
        if len(found) != len(self.layers.layers):
            raise ValueError("this model remembers more than keys and values of all positions")
        self.layers.layers = [_RoomyLayer(self._horizon) for _ in found]
        return found

    def spread(self, asked_B: torch.Tensor) -> None:
        """Make a row of each of these, some perhaps more than once."""
        for layer in self.layers.layers:
            layer.reorder_cache(asked_B)

    def keep(self, live_B: torch.Tensor) -> None:
        """Go on with these rows, each at most once; those that stay in their place cost nothing (see `compacted`)."""
        for layer in self.layers.layers:
            if isinstance(layer, _RoomyLayer):
                layer.keep(live_B)
            else:
                layer.reorder_cache(live_B)


def compacted(is_live_B: torch.Tensor) -> torch.Tensor:
    """The live rows, in an order that leaves all in their place but the last ones, which fill the gaps."""
    live = is_live_B.nonzero()[:, 0]
    order = torch.arange(len(live), device=live.device)
    order[~is_live_B[: len(live)]] = live[live >= len(live)]
    return order


class _RoomyLayer(DynamicLayer):
    """`keys` and `values` (B, H, T, D) are views of wider tensors once the prompts are read."""

    def __init__(self, horizon: int) -> None:
        super().__init__()
        self._horizon = horizon
        self._room: list[torch.Tensor] = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Write what is fed behind what is there; gives all of it."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        start, stop = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if not self._room or stop > self._room[0].shape[2]:
            self._widen(stop)
        rows = len(key_states)
        for room, fed in zip(self._room, (key_states, value_states), strict=True):
            room[:rows, :, start:stop] = fed
        self._show(rows, stop)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Any rows in any order, by a copy."""
        self.keys, self.values = self.keys[beam_idx], self.values[beam_idx]
        self._room = []

    def keep(self, live_B: torch.Tensor) -> None:
        """Rows that are all different and move towards the front, in place."""
        if not self._room:
            self.reorder_cache(live_B)
            return
        gap_B = (live_B != torch.arange(len(live_B), device=live_B.device)).nonzero()[:, 0]
        used = self.keys.shape[2]
        if len(gap_B):
            for room in self._room:
                room[gap_B, :, :used] = room[live_B[gap_B], :, :used]
        self._show(len(live_B), used)

    def _widen(self, least: int) -> None:
        width = min(max(least, self._horizon), max(2 * self.keys.shape[2], least + _LEAST_ROOM))
        for number, held in enumerate((self.keys, self.values)):
            room = held.new_empty(len(held), held.shape[1], width, held.shape[3])
            room[:, :, : held.shape[2]] = held
            self._room[number : number + 1] = [room]

    def _show(self, rows: int, used: int) -> None:
        self.keys, self.values = (room[:rows, :, :used] for room in self._room)
