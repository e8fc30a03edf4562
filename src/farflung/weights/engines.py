"""Validator: an engine for each arithmetic that audits ask for, made when the first of them does."""

import logging
from collections.abc import Callable, Sequence

import torch

from farflung.engine.fit import held_bytes, measure
from farflung.engine.local import LocalEngine
from farflung.net.node_stats import NodeStats
from farflung.numerics.devices import free_bytes
from farflung.protocol.numerics import Dtype
from farflung.weights.cache import Versions
from farflung.weights.loaded import Loaded

log = logging.getLogger(__name__)
MOST_OF_FREE = 0.8
"""Share of free memory that another engine's weights may take; caches and logits need the rest."""
Build = Callable[[torch.dtype], LocalEngine]


class Engines:
    """Engines of one model on one device, by arithmetic. The `stats` are told of the first one's version alone."""

    def __init__(
        self, build: Build, config: bytes, device: torch.device, versions: Versions, first: Dtype, stats: NodeStats
    ) -> None:
        """Build the engine of the arithmetic `first`; its weights are yet to come. Raises ConfigError."""
        self._build, self._config, self._device, self._versions = build, config, device, versions
        self._first, self._stats = first, stats
        self._held: dict[Dtype, Loaded] = {}
        self._needed: dict[Dtype, int] = {}
        """Bytes of the weights in an arithmetic, once they were counted."""
        self._make(first)

    def loaded_in(self, arithmetics: Sequence[Dtype]) -> tuple[Dtype, Loaded]:
        """The engine of the first of these arithmetics that is there or has room, and which of them it is.

        Where none of them is there or has room, the engines that are make room for the first.
        """
        for arithmetic in arithmetics:
            if arithmetic in self._held or self._has_room(arithmetic):
                return arithmetic, self._held.get(arithmetic) or self._make(arithmetic)
        log.warning("no room for %s beside %s: one at a time", arithmetics[0], ", ".join(self._held))
        self._held.clear()
        return arithmetics[0], self._make(arithmetics[0])

    def invalidate(self) -> None:
        """Let no engine count as holding weights that anybody knows."""
        for loaded in self._held.values():
            loaded.invalidate()

    def _make(self, arithmetic: Dtype) -> Loaded:
        engine = self._build(getattr(torch, arithmetic))
        log.info("replays in=%s on=%s", arithmetic, self._device)
        stats = self._stats if arithmetic == self._first else None
        self._held[arithmetic] = Loaded(engine, self._versions, stats=stats)
        return self._held[arithmetic]

    def _has_room(self, arithmetic: Dtype) -> bool:
        if arithmetic not in self._needed:
            size = measure(self._config, getattr(torch, arithmetic))
            self._needed[arithmetic] = held_bytes(size, self._device.type)
        return self._needed[arithmetic] <= free_bytes(self._device) * MOST_OF_FREE
