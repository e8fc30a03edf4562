"""The policy in training: a Hugging Face causal LM with float32 masters, its log-probabilities and its publication.

Legend: B rollouts, T positions of their completions.
"""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from farflung.learner.checkpointing import checkpoint_calmly
from farflung.learner.forward import find_kind, logp_entropy_BT
from farflung.learner.lora import adapt, base, factors_of, merged, published
from farflung.learner.pack import MicroBatch
from farflung.learner.pretrained import load_pretrained
from farflung.learner.ranks import Ranks, shard, whole
from farflung.learner.straight_through import compute_as_published
from farflung.numerics.merge import Factors
from farflung.numerics.rounding import publishable
from farflung.protocol.errors import ConfigError


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
        is_lora_alone: bool = False,
    ) -> None:
        """Take a model; its parameters become float32. `is_checkpointed` trades a second forward pass for memory.

        Dropout stays off, or the ratio of the first update would not be 1. With several `ranks` the model is sharded,
        and every rank must do the same with it in the same order. With a `lora_rank` only adapters are trained; not on
        several ranks. With `is_lora_alone` they travel without the rest: then frozen matrices are rounded as they were
        published, and adapted ones are merged as others merge them. Raises ConfigError.
        """
        self.model = model.float().eval()
        self.compute_dtype, self.is_dithered = compute_dtype, is_dithered
        if is_checkpointed:
            checkpoint_calmly(model)
        self.ranks = ranks or Ranks()
        self._names = list(model.state_dict())
        is_rounded = is_dithered and compute_dtype == torch.bfloat16 and self.ranks.is_alone
        if lora_rank:
            if not self.ranks.is_alone:
                raise ConfigError(
                    f"learn.lora_rank = {lora_rank} works in one process; start the trainer without torchrun"
                )
            adapt(model, lora_rank, lora_scale, is_alone=is_lora_alone, is_rounded=is_rounded)
        if is_rounded:
            compute_as_published(model)
        self.is_lora_alone = is_lora_alone and lora_rank > 0
        self._kind = find_kind(model)
        if not self.ranks.is_alone:
            shard(model)  # a sharded head has weights only while the whole model runs
            self._kind = replace(self._kind, has_linear_head=False)

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
        is_lora_alone: bool = False,
    ) -> "Policy":
        """Load a folder or a hub id, strictly, as `learner/pretrained.py` says. Raises ConfigError."""
        return cls(
            load_pretrained(source, torch.float32).to(device),
            compute_dtype=compute_dtype,
            is_checkpointed=is_checkpointed,
            is_dithered=is_dithered,
            ranks=ranks,
            lora_rank=lora_rank,
            lora_scale=lora_scale,
            is_lora_alone=is_lora_alone,
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    def logp_BT(self, micro: MicroBatch) -> torch.Tensor:
        """log softmax(logits / T) of each trained token given what precedes it, float32 (B, T); 0 off the mask."""
        return self.logp_entropy_BT(micro)[0]

    def logp_entropy_BT(self, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """As `logp_BT`, and the entropy in nats of each of those distributions, (B, T); both with gradient."""
        return logp_entropy_BT(self.model, micro, self._kind, self._autocast)

    @property
    def can_share(self) -> bool:
        """Whether completions of one prompt may stand in one row: the model obeys an attention mask and places."""
        return self._kind.can_share

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Published tensors: (name, bfloat16) of each parameter and buffer, cast from the masters, tied twins once."""
        for name, tensor in self.masters():
            yield name, self.rounded(tensor)

    def rounded(self, tensor: torch.Tensor, start: int = 0) -> torch.Tensor:
        """A master as it is published: the whole of it, or a part before which so many values come."""
        return publishable(tensor, start, is_dithered=self.is_dithered)

    def masters(self, names: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of the float32 masters, whole, tied twins once, in the model's order; of some names or all.

        Matrices whose adapters travel alone are not float32 but as published.
        """
        for name, tensor in self.shards(names):
            yield name, whole(tensor)

    def shards(self, names: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        """The same as this rank holds them, adapters merged."""
        for name, tensor in self._slots():
            if not names or name in names:
                yield name, self._merged(name) if tensor is None else tensor.detach()

    def shapes(self) -> Iterator[tuple[str, torch.Size]]:
        """(name, shape) of all that is published."""
        for name, tensor in self._slots():
            yield name, base(self.model, name).shape if tensor is None else tensor.shape

    def base(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Published tensors of the model without its adapters, bfloat16."""
        for name, tensor in self._slots():
            yield name, base(self.model, name) if tensor is None else self.rounded(tensor.detach())

    def factors(self) -> list[Factors]:
        """The adapters as they are published. Raises WeightsError where one is not finite."""
        return [factors_of(self.model, name) for name, tensor in self._slots() if tensor is None]

    def _slots(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """(name, tensor) in the model's order, tied twins once; None for what has an adapter."""
        seen: set[int] = set()
        state = self.model.state_dict(keep_vars=True)
        for name in self._names:
            tensor = state.get(name)
            if tensor is None or id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, tensor

    def _merged(self, name: str) -> torch.Tensor:
        return published(self.model, name) if self.is_lora_alone else merged(self.model, name)

    def _autocast(self) -> AbstractContextManager[None]:
        is_mixed = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, self.compute_dtype if is_mixed else torch.bfloat16, enabled=is_mixed)
