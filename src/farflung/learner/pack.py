"""Packs rollouts into right-padded micro-batches of bounded size.

Legend: B rollouts of a micro-batch, T positions. The loss mask follows from where each segment came from.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Source = Literal["prompt", "model", "env"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens and who wrote it; only what the model wrote is trained on."""

    source: Source
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sample as the trainer sees it: its tokens, what it was worth, and how it was sampled."""

    segments: tuple[Segment, ...]
    advantage: float
    temperature: float
    worker_logp: tuple[float, ...] | None = None
    """One number per model token, as the worker claims it: a metric, never part of the loss."""

    def __len__(self) -> int:
        return sum(len(segment.ids) for segment in self.segments)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rollouts that go through the model together. Row b is `rollouts[index[b]]` of what was packed."""

    ids_BT: torch.Tensor
    """int64, 0 where padded; position t of a row is its column t, so no position ids are needed."""
    mask_BT: torch.Tensor
    """bool, True on tokens that the model wrote; never in column 0, which nothing predicts."""
    adv_B: torch.Tensor
    temperature_B: torch.Tensor
    """Sampling temperatures; 1 stands for greedy rollouts, whose log-probabilities are taken at 1."""
    index: tuple[int, ...]
    worker_logp_BT: torch.Tensor | None = None
    """float32, NaN where the worker sent none."""

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device."""
        tensors = (self.ids_BT, self.mask_BT, self.adv_B, self.temperature_B)
        worker = None if self.worker_logp_BT is None else self.worker_logp_BT.to(device)
        return MicroBatch(*(tensor.to(device) for tensor in tensors), self.index, worker)


def pack(rollouts: Sequence[Rollout], tokens_per_microbatch: int) -> list[MicroBatch]:
    """Micro-batches of at most `tokens_per_microbatch` padded tokens, shortest rollouts first.

    Rollouts of like length share a batch. The order is a function of the rollouts alone: length, then place in the
    sequence. A rollout longer than the bound gets a micro-batch of its own; empty ones are left out.
    """
    return [_batch(rollouts, chunk) for chunk in _chunks([len(rollout) for rollout in rollouts], tokens_per_microbatch)]


def _chunks(lengths: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
    chunk: list[int] = []
    for index in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: lengths[i]):
        if chunk and lengths[index] * (len(chunk) + 1) > most_tokens:
            yield chunk
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk


def _batch(rollouts: Sequence[Rollout], chunk: Sequence[int]) -> MicroBatch:
    rows = [rollouts[index] for index in chunk]
    shape = (len(rows), max(len(row) for row in rows))
    ids_BT, mask_BT = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    worker_logp_BT = torch.full(shape, float("nan"))
    for b, row in enumerate(rows):
        ids_BT[b, : len(row)] = torch.tensor([token for segment in row.segments for token in segment.ids])
        mask_BT[b, : len(row)] = torch.tensor([s.source == "model" for s in row.segments for _ in s.ids])
        _place_worker_logp(worker_logp_BT[b], mask_BT[b], row.worker_logp)
    mask_BT[:, 0] = False
    return MicroBatch(
        ids_BT=ids_BT,
        mask_BT=mask_BT,
        adv_B=torch.tensor([row.advantage for row in rows]),
        temperature_B=torch.tensor([row.temperature if row.temperature > 0 else 1.0 for row in rows]),
        index=tuple(chunk),
        worker_logp_BT=worker_logp_BT if any(row.worker_logp for row in rows) else None,
    )


def _place_worker_logp(worker_logp_T: torch.Tensor, mask_T: torch.Tensor, claimed: tuple[float, ...] | None) -> None:
    """Write the worker's figures where the model's tokens are; a list of the wrong length says nothing."""
    if claimed is not None and len(claimed) == int(mask_T.sum()):
        worker_logp_T[mask_T] = torch.tensor(claimed)
