"""Worker, validator and trainer: which version of the weights an engine holds; each of them loads a version here.

An engine with half a version, or with another than it is taken for, makes an honest worker look like a cheat, and a
validator damn the honest. So a version counts as loaded only once it is whole, and no value that was read from the
engine outlives the weights it was read from.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from farflung.engine.base import Engine
from farflung.engine.loading import read_slices
from farflung.net.node_stats import NodeStats
from farflung.numerics.quantise import quantised
from farflung.protocol import probe
from farflung.protocol.errors import WeightsError
from farflung.protocol.numerics import Quantiser
from farflung.protocol.probe import Slice
from farflung.weights.cache import Versions
from farflung.weights.parts import whole_shapes
from farflung.weights.tensors import tensors

NOTHING = ""
"""No manifest has this digest."""
Weights = Callable[[], Iterable[tuple[str, torch.Tensor]]]


class Loaded:
    """The version of the weights in one engine, by the digest of its manifest and the quantiser it went through.

    The `stats` of a session are told which step it is, -1 for none, as the node's heartbeats say it.
    """

    def __init__(self, engine: Engine, versions: Versions, *, stats: NodeStats | None = None) -> None:
        self.engine, self._versions, self._stats = engine, versions, stats
        self._digest, self._quantiser = NOTHING, ""
        self._values: dict[str, bytes] = {}
        """By probe key, the values of its slices in the engine."""

    def has(self, digest: str, quantiser: Quantiser | None = None) -> bool:
        """Whether the engine holds this version, whole; quantised so, if that is said."""
        return digest == self._digest != NOTHING and quantiser in (None, self._quantiser)

    async def fetch(self, digest: str, quantiser: Quantiser = "") -> None:
        """Have a version on disk, unless the engine holds it so. Raises WeightsError, BadSignature, NotFound."""
        if not self.has(digest, quantiser):
            await self._versions.fetch(digest)

    def ensure(self, digest: str, own: Weights | None = None, *, quantiser: Quantiser = "") -> None:
        """Have a version in the engine: one that was fetched, or the weights that its maker has in memory, `own`.

        Does nothing where it is there. Raises WeightsError. After a fault of any kind nothing counts as loaded, and
        the next call loads anew.
        """
        if self.has(digest, quantiser):
            return
        step = self._versions.known(digest).step if own is None else -1
        self.invalidate()
        self.engine.load(quantised(tensors(self._versions, digest) if own is None else own(), quantiser))
        self._count_as(digest, step)
        self._quantiser = quantiser

    def stored(self, digest: str) -> Iterable[tuple[str, torch.Tensor]]:
        """The tensors of a version that was fetched. Raises WeightsError."""
        return tensors(self._versions, digest)

    def invalidate(self) -> None:
        """Forget what the engine holds: it is about to change, or has been found to be another."""
        self._values.clear()
        self._count_as(NOTHING, -1)

    def possession(self, nonce: str, key: str) -> str:
        """The answer to a probe: SHA-256 in hex over the nonce and the slices of the engine's weights that it chooses.

        Nonce and probe key are in hex. The slices are read once after each load; of a quantised version from what it
        was made of. Raises WeightsError if none is whole.
        """
        if self._digest == NOTHING:
            raise WeightsError("the engine holds no whole version, so none can be shown; load one first")
        if key not in self._values:
            shapes = whole_shapes((one.name, one.shape) for one in self._versions.known(self._digest).tensors)
            slices = probe.slices(shapes, bytes.fromhex(key))
            self._values[key] = self._stored_values(slices) if self._quantiser else self.engine.values(slices)
        return probe.answer(nonce, self._values[key])

    def _stored_values(self, slices: Sequence[Slice]) -> bytes:
        names = {one.name for one in slices}
        return read_slices({name: one for name, one in self.stored(self._digest) if name in names}, slices)

    def _count_as(self, digest: str, step: int) -> None:
        self._digest = digest
        if self._stats is not None:
            self._stats.loaded_step = step
