"""Trainer: log-probabilities of rollouts under the weights that they were leased at, by its own computation.

They decide how much a stale token counts and serve several updates of one step, so they are written down before that
step: replayed after a crash, it must come to the same bits, and the old weights may be gone by then.

Legend: B rollouts of a micro-batch, T positions of their completions, N tokens of one rollout.
"""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from farflung.learner.forward import Kind, find_kind, logp_entropy_BT
from farflung.learner.pack import Rollout, pack
from farflung.learner.ranks import Ranks, split
from farflung.protocol.errors import WeightsError

Logp = dict[int, torch.Tensor]
"""By the index of a rollout, the log-probability of each of its model tokens, float32 (N,), on the CPU."""


def stale(rollouts: Sequence[Rollout], present: int) -> dict[int, list[int]]:
    """Indices of the rollouts that an earlier policy than `present` generated, by its step."""
    found: dict[int, list[int]] = {}
    for index, rollout in enumerate(rollouts):
        if rollout.step < present:
            found.setdefault(rollout.step, []).append(index)
    return found


@torch.no_grad()
def behaviour(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    which: Sequence[int],
    tokens: int,
    *,
    kind: Kind | None = None,
    ranks: Ranks | None = None,
) -> Logp:
    """Log-probabilities of some rollouts under a model, `tokens` at a time; zeros for those of other ranks."""
    kind = kind or find_kind(model)
    packed = pack([rollouts[index] for index in which], tokens, is_shared=kind.can_share)
    found = {which[place]: torch.zeros(len(mask_T[mask_T])) for micro in packed for place, mask_T in micro.masks()}
    for micro, counts in split(packed, ranks or Ranks()):
        logp_BT, _ = logp_entropy_BT(model, micro, kind, nullcontext)
        for (place, mask_T), logp_T in zip(micro.masks(), logp_BT.cpu(), strict=True):
            found[which[place]] = logp_T[mask_T] if counts else found[which[place]]
    return found


def keep(logp: Logp, folder: Path, step: int) -> None:
    """Write a step's log-probabilities, complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{_name(step)}.part"
    save_file({str(index): values.contiguous() for index, values in logp.items()}, draft)
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    draft.replace(folder / _name(step))


def stored(folder: Path, step: int) -> Logp:
    """The log-probabilities written for a step. Raises WeightsError if it is gone."""
    path = folder / _name(step)
    if not path.exists():
        raise WeightsError(
            f"{path} is missing; step {step} used what its rollouts were worth before and cannot be replayed without it"
        )
    try:
        return {int(index): values for index, values in load_file(path).items()}
    except SafetensorError as error:
        raise WeightsError(f"{path} is damaged ({error}), and step {step} cannot be replayed without it") from error


def _name(step: int) -> str:
    return f"step-{step:06d}.safetensors"
