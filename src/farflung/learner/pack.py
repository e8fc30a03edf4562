"""Packs rollouts into micro-batches of bounded size: a prompt that several rollouts share is computed once.

Rows longer than `ROW_TOKENS` hold one rollout each and need no mask (`numerics/packing.py`).

Legend: B rollouts of a micro-batch, T positions of their completions.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from farflung.numerics.packing import ROW_TOKENS, PackedRows, Tree, rows_of, trees

Source = Literal["prompt", "model", "env"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens and its writer; only the model's own are trained on."""

    source: Source
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sample as the trainer sees it: its tokens, its advantage, and how it was sampled."""

    segments: tuple[Segment, ...]
    advantage: float
    temperature: float
    worker_logp: tuple[float, ...] | None = None
    """One number per model token, as the worker claims it: a metric, never part of the loss."""
    step: int = -1
    """The policy that it was leased at; -1 for the present one."""

    def __len__(self) -> int:
        return sum(len(segment.ids) for segment in self.segments)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rollouts that go through the model together. Row b is `rollouts[index[b]]` of what was packed."""

    token_BT: torch.Tensor
    """int64, what follows each prompt, 0 where padded."""
    mask_BT: torch.Tensor
    """bool, True on tokens that the model wrote."""
    adv_B: torch.Tensor
    temperature_B: torch.Tensor
    """Sampling temperatures; 1 stands for greedy rollouts, whose log-probabilities are taken at 1."""
    index: tuple[int, ...]
    rows: PackedRows
    worker_logp_BT: torch.Tensor | None = None
    """float32, NaN where the worker sent none."""

    def masks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Of each row its rollout, and which of its tokens the model wrote, (T,)."""
        return zip(self.index, self.mask_BT, strict=True)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device."""
        return replace(
            self,
            token_BT=self.token_BT.to(device),
            mask_BT=self.mask_BT.to(device),
            adv_B=self.adv_B.to(device),
            temperature_B=self.temperature_B.to(device),
            rows=PackedRows(*(_moved(getattr(self.rows, name), device) for name in PackedRows.__dataclass_fields__)),
            worker_logp_BT=_moved(self.worker_logp_BT, device),
        )


@dataclass(frozen=True, slots=True)
class _Parts:
    """A rollout as prompt and completion."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    is_model: tuple[bool, ...]


def pack(
    rollouts: Sequence[Rollout], tokens_per_microbatch: int, *, is_shared: bool = True, at_least: int = 1
) -> list[MicroBatch]:
    """Micro-batches of at most `tokens_per_microbatch` fed tokens, padding included, longest rows first.

    They are smaller where there would be fewer than `at_least`, the updates of a step. The order is a function of the
    rollouts alone. A rollout longer than the bound gets a micro-batch of its own; those without anything to train on
    are left out. Without `is_shared` every row is one rollout, for models that do not obey an attention mask.
    """
    parts = {index: split for index, rollout in enumerate(rollouts) if any((split := _split(rollout)).is_model)}

    def layouts(most_tokens: int) -> list[list[list[Tree]]]:
        texts = ((index, part.prompt, part.ids) for index, part in parts.items())
        of_prompts = trees(texts, min(ROW_TOKENS, most_tokens) if is_shared else 0)
        return list(_layouts(of_prompts, most_tokens, is_shared=is_shared))

    found = _halved(layouts(tokens_per_microbatch), at_least)
    if len(found) < at_least:
        found = _smaller(layouts, sum(rows[0][0].width * len(rows) for rows in found), at_least)
    return [_batch(rollouts, parts, rows) for rows in found]


def _smaller(layouts: Callable[[int], list[list[list[Tree]]]], fed: int, at_least: int) -> list[list[list[Tree]]]:
    """As few micro-batches as are enough, for each repeats the prompts of the groups that it cuts, and as even."""
    sizes = range(1, max(1, fed) + 1)
    few = bisect_left(sizes, 1, key=lambda most: len(layouts(most)) < at_least)  # the first size with too few
    count = len(layouts(sizes[max(0, few - 1)]))
    return layouts(sizes[bisect_left(sizes, 1, key=lambda most: len(layouts(most)) <= count)])  # the most even of them


def _halved(layouts: list[list[list[Tree]]], at_least: int) -> list[list[list[Tree]]]:
    """The same rows in more micro-batches, the highest cut in two until there are enough or each has one row."""
    while layouts and len(layouts) < at_least and len(highest := max(layouts, key=len)) > 1:
        at, middle = layouts.index(highest), len(highest) // 2
        layouts[at : at + 1] = [highest[:middle], highest[middle:]]
    return layouts


def fill(microbatches: Sequence[MicroBatch]) -> float:
    """Share of the fed tokens that are no padding; 1 if nothing is fed."""
    fed = sum(micro.rows.ids_RW.numel() for micro in microbatches)
    return sum(int((micro.rows.tree_RW >= 0).sum()) for micro in microbatches) / fed if fed else 1.0


def _split(rollout: Rollout) -> _Parts:
    """The ids before the first token of the model, at least one, and those that follow."""
    flat = [(token, segment.source == "model") for segment in rollout.segments for token in segment.ids]
    start = max(1, next((place for place, (_, is_model) in enumerate(flat) if is_model), len(flat)))
    ids, is_model = tuple(token for token, _ in flat), tuple(is_model for _, is_model in flat)
    return _Parts(ids[:start], ids[start:], is_model[start:])


def _layouts(trees: Sequence[Tree], most_tokens: int, *, is_shared: bool) -> Iterator[list[list[Tree]]]:
    """Rows that go through the model at once, each a list of trees; a short tree fills a longer row's rest."""
    rows: list[list[Tree]] = []
    for tree in trees:
        width = rows[0][0].width if rows else 0
        is_masked = is_shared and width <= ROW_TOKENS
        free = next((row for row in rows if is_masked and sum(t.width for t in row) + tree.width <= width), None)
        if free is not None:
            free.append(tree)
            continue
        is_other_kind = is_shared and width > ROW_TOKENS >= tree.width
        if rows and (width * (len(rows) + 1) > most_tokens or is_other_kind):
            yield rows
            rows = []
        rows.append([tree])
    if rows:
        yield rows


def _batch(rollouts: Sequence[Rollout], parts: dict[int, _Parts], rows: Sequence[Sequence[Tree]]) -> MicroBatch:
    index = tuple(member for row in rows for tree in row for member in tree.members)
    shape = (len(index), max(len(parts[member].ids) for member in index))
    token_BT, mask_BT = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    worker_logp_BT = torch.full(shape, float("nan"))
    for b, member in enumerate(index):
        part = parts[member]
        token_BT[b, : len(part.ids)] = torch.tensor(part.ids)
        mask_BT[b, : len(part.ids)] = torch.tensor(part.is_model)
        _place_worker_logp(worker_logp_BT[b], mask_BT[b], rollouts[member].worker_logp)
    chosen = [rollouts[member] for member in index]
    return MicroBatch(
        token_BT=token_BT,
        mask_BT=mask_BT,
        adv_B=torch.tensor([rollout.advantage for rollout in chosen]),
        temperature_B=torch.tensor([rollout.temperature if rollout.temperature > 0 else 1.0 for rollout in chosen]),
        index=index,
        rows=_rows(parts, rows),
        worker_logp_BT=worker_logp_BT if any(rollout.worker_logp for rollout in chosen) else None,
    )


def _rows(parts: dict[int, _Parts], rows: Sequence[Sequence[Tree]]) -> PackedRows:
    """The model's input, where only its own tokens are predicted."""
    every = rows_of(rows, {index: part.ids for index, part in parts.items()})
    is_trained = [flag for row in rows for tree in row for index in tree.members for flag in parts[index].is_model]
    return replace(every, predictor_N=every.predictor_N[torch.tensor(is_trained)])


def _place_worker_logp(worker_logp_T: torch.Tensor, mask_T: torch.Tensor, claimed: tuple[float, ...] | None) -> None:
    """Write the worker's figures where the model's tokens are; a list of the wrong length says nothing."""
    if claimed is not None and len(claimed) == int(mask_T.sum()):
        worker_logp_T[mask_T] = torch.tensor(claimed)


def _moved(value: torch.Tensor | bool | None, device: torch.device) -> torch.Tensor | bool | None:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def lay(packed: Sequence[MicroBatch], logp: Mapping[int, torch.Tensor]) -> list[torch.Tensor] | None:
    """Log-probabilities by index of rollout, laid out as (B, T) per micro-batch, else not-a-number; None for none."""
    if not logp:
        return None
    found = []
    for micro in packed:
        logp_BT = torch.full(micro.mask_BT.shape, float("nan"))
        for b, index in enumerate(micro.index):
            if index in logp:
                logp_BT[b][micro.mask_BT[b]] = logp[index]
        found.append(logp_BT)
    return found
