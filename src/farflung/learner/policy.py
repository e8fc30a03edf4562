"""The policy in training: a Hugging Face causal LM with float32 masters, its log-probabilities and its publication.

Legend: B rollouts, T positions of their completions.
"""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from farflung.learner.checkpointing import checkpoint_calmly
from farflung.learner.forward import find_kind, logp_entropy_BT
from farflung.learner.lora import adapt, factors_of, frozen, layer_of, published
from farflung.learner.pack import MicroBatch
from farflung.learner.pretrained import fill_shares, load_pretrained, skeleton
from farflung.learner.ranks import Ranks, shard, whole
from farflung.learner.straight_through import compute_as_published
from farflung.numerics.merge import Factors
from farflung.numerics.rounding import publishable


class Policy:
    """A model whose masters are float32 and whose forward pass may run in bfloat16."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        compute_dtype: torch.dtype = torch.float32,
        is_checkpointed: bool = False,
        is_dithered: bool = False,
        ranks: Ranks | None = None,
        lora_rank: int = 0,
        lora_scale: float = 2.0,
        device: torch.device | str | None = None,
        source: str | Path = "",
    ) -> None:
        """Take a model; its parameters become float32. `is_checkpointed` trades a second forward pass for memory.

        Dropout stays off, or the ratio of the first update would not be 1. With several `ranks` the model is sharded
        over their devices of the kind of `device`, and every rank must do the same with it in the same order; if it
        came without weights, each then reads its own from `source`. With a `lora_rank` only adapters are trained, and
        all else is as it was published, in `compute_dtype`. Raises ConfigError.
        """
        self.model = model.float().eval()
        self.compute_dtype, self.is_dithered = compute_dtype, is_dithered
        if is_checkpointed:
            checkpoint_calmly(model)
        self.ranks = ranks or Ranks()
        self._names = list(model.state_dict())
        self.is_adapted = lora_rank > 0
        on = torch.device(device or model.device)
        if self.is_adapted:
            is_held = self.ranks.is_alone and on.type == "cpu"
            adapt(model, lora_rank, lora_scale, compute_dtype, is_empty=bool(source), is_held=is_held)
        elif is_dithered and compute_dtype == torch.bfloat16 and self.ranks.is_alone:
            compute_as_published(model)
        if not self.ranks.is_alone:
            shard(model, on, compute_dtype, is_dithered=is_dithered)
        if source:
            fill_shares(model, source, self.ranks, partial(frozen, dtype=compute_dtype) if self.is_adapted else None)
        self._kind = find_kind(model, dtype=None if self.ranks.is_alone else compute_dtype)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        compute_dtype: torch.dtype = torch.float32,
        is_checkpointed: bool = False,
        device: torch.device | str = "cpu",
        is_dithered: bool = False,
        ranks: Ranks | None = None,
        lora_rank: int = 0,
        lora_scale: float = 2.0,
    ) -> "Policy":
        """Load a folder or a hub id, strictly, as `learner/pretrained.py` says. Raises ConfigError.

        Of several ranks each reads its share and holds no more.
        """
        is_alone = ranks is None or ranks.is_alone
        return cls(
            load_pretrained(source, torch.float32).to(device) if is_alone else skeleton(source),
            compute_dtype=compute_dtype,
            is_checkpointed=is_checkpointed,
            is_dithered=is_dithered,
            ranks=ranks,
            lora_rank=lora_rank,
            lora_scale=lora_scale,
            device=device,
            source="" if is_alone else source,
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    def logp_BT(self, micro: MicroBatch) -> torch.Tensor:
        """log softmax(logits / T) of each trained token given what precedes it, float32 (B, T); 0 off the mask."""
        return self.logp_entropy_BT(micro)[0]

    def logp_entropy_BT(
        self, micro: MicroBatch, *, is_entropy_trained: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `logp_BT`, and the entropy in nats of each of those distributions, (B, T); with gradient if asked for."""
        kind, autocast = self._kind, self._autocast
        return logp_entropy_BT(self.model, micro, kind, autocast, is_entropy_trained=is_entropy_trained)

    @property
    def can_share(self) -> bool:
        """Whether completions of one prompt may stand in one row: the model obeys an attention mask and places."""
        return self._kind.can_share

    @property
    def can_pad(self) -> bool:
        """Whether rows of several lengths go through the model at once, and not one by one."""
        return self._kind.can_pad

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Published tensors: (name, bfloat16) of each parameter and buffer, cast from the masters, tied twins once."""
        for name, tensor in self.masters():
            yield name, self.rounded(tensor)

    def rounded(self, tensor: torch.Tensor, start: int = 0) -> torch.Tensor:
        """A master as it is published: the whole of it, or a part before which so many values come."""
        return publishable(tensor, start, is_dithered=self.is_dithered)

    def masters(self, names: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of the float32 masters, whole, tied twins once, in the model's order; of some names or all.

        Where adapters alone are trained, tensors are as published and not float32.
        """
        for name, tensor in self.shards(names):
            yield name, whole(tensor)

    def shards(self, names: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        """The same as this rank holds them, adapters merged; every rank must ask."""
        for name, tensor in self._slots():
            if not names or name in names:
                layer = layer_of(self.model, name)
                yield name, tensor.detach() if layer is None else published(layer, name)

    def shapes(self) -> Iterator[tuple[str, torch.Size]]:
        """(name, shape) of all that is published."""
        return ((name, tensor.shape) for name, tensor in self._slots())

    def base(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Published tensors of the model without its adapters, bfloat16; every rank must ask."""
        return ((name, self.rounded(whole(tensor.detach()))) for name, tensor in self._slots())

    def factors(self) -> list[Factors]:
        """The adapters as they are published; every rank must ask. Raises WeightsError where one is not finite."""
        layers = [(name, layer_of(self.model, name)) for name, _ in self._slots()]
        return [factors_of(layer, name) for name, layer in layers if layer is not None]

    def _slots(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) in the model's order, tied twins once."""
        seen: set[int] = set()
        state = self.model.state_dict(keep_vars=True)
        for name in self._names:
            tensor = state[name]
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, tensor

    def _autocast(self) -> AbstractContextManager[None]:
        """Where weights come in the short type, of a frozen model or gathered of several ranks, nothing is cast."""
        is_mixed = self.compute_dtype != torch.float32 and self.ranks.is_alone and not self.is_adapted
        return torch.autocast(self.device.type, self.compute_dtype if is_mixed else torch.bfloat16, enabled=is_mixed)
