"""Attacks that generate with other weights than the lease asks for.

Each docstring says what the attack would gain, then what stops it.
"""

import copy
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from farflung.engine.base import Request
from farflung.numerics.quantise import quantised
from farflung.protocol.numerics import Quantiser
from farflung.redteam.adversary import Attack, Made, Stop


class OtherWeights(Attack):
    """Base of the attacks that keep the true weights for possession and generate with others."""

    def load(self, tensors: Sequence[tuple[str, Any]]) -> None:
        self.own = getattr(self, "own", None) or copy.deepcopy(self.truth)
        self.own.load(self.bent(tensors))

    def bent(self, tensors: Sequence[tuple[str, Any]]) -> Sequence[tuple[str, Any]]:
        """The weights to generate with."""
        raise NotImplementedError

    def generate(self, requests: Sequence[Request], should_stop: Stop) -> Made:
        return self.own.generate(requests, should_stop)


class Quantised(OtherWeights):
    """Cheaper arithmetic: weights of a few bits under a profile that promises more; replay, int8 slowly."""

    def __init__(self, quantiser: Quantiser) -> None:
        self.quantiser: Quantiser = quantiser

    def bent(self, tensors: Sequence[tuple[str, Any]]) -> Sequence[tuple[str, Any]]:
        return list(quantised(tensors, self.quantiser))


class Stale(OtherWeights):
    """No downloads: generates with the weights of some loads before and proves possession of the leased; replay."""

    def __init__(self, versions: int) -> None:
        self._kept: deque[Sequence[tuple[str, Any]]] = deque(maxlen=versions + 1)

    def bent(self, tensors: Sequence[tuple[str, Any]]) -> Sequence[tuple[str, Any]]:
        self._kept.append(tensors)
        return self._kept[0]


class First(OtherWeights):
    """Never swaps weights: generates with the first ones it got, proves possession of the leased; replay."""

    def bent(self, tensors: Sequence[tuple[str, Any]]) -> Sequence[tuple[str, Any]]:
        self._first = getattr(self, "_first", tensors)
        return self._first


class Pruned(OtherWeights):
    """A model at a fraction of the cost: the smallest 70 % of every matrix are zero; replay."""

    def bent(self, tensors: Sequence[tuple[str, Any]]) -> Sequence[tuple[str, Any]]:
        return [(name, _pruned(tensor) if tensor.ndim == 2 else tensor) for name, tensor in tensors]


def _pruned(weight: torch.Tensor) -> torch.Tensor:
    least = weight.float().abs().flatten().quantile(0.7)
    return weight.masked_fill(weight.float().abs() < least, 0)


class OneLayer(OtherWeights):
    """A subtly broken model: one matrix of one layer is off by 5 %; replay."""

    def bent(self, tensors: Sequence[tuple[str, Any]]) -> Sequence[tuple[str, Any]]:
        victim = next(name for name, tensor in tensors if ".layers." in name and tensor.ndim == 2)
        noise = torch.Generator().manual_seed(1)
        return [(n, t * (1 + 0.05 * torch.randn(t.shape, generator=noise)) if n == victim else t) for n, t in tensors]
