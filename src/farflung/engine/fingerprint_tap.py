"""Fingerprints in torch: the output head's input, caught by a hook and projected as it comes.

Legend: B live rows, R requests, S rows of one nonce, N completion tokens of all rows, T positions, D hidden size,
K numbers of a fingerprint.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel

from farflung.engine.base import Request
from farflung.protocol.fingerprint import NUMBERS, POSITIONS, Floats, pack, signs


class Tap:
    """The latest input of the output head, float32 (rows, D)."""

    fed_BD: torch.Tensor

    def note(self, _head: torch.nn.Module, fed: tuple[torch.Tensor, ...]) -> None:
        """Keep what the head is about to be fed."""
        self.fed_BD = fed[0].flatten(0, -2).float()


@contextmanager
def tapped(model: PreTrainedModel, requests: Sequence[Request]) -> Iterator[Tap | None]:
    """A tap on the model's output head for as long as this lasts; none if no request asks for a fingerprint."""
    if not any(request.nonce for request in requests):
        yield None
        return
    tap = Tap()
    hook = model.get_output_embeddings().register_forward_pre_hook(tap.note)
    try:
        yield tap
    finally:
        hook.remove()


class Sketches:
    """The running projections of a batch of requests; those without a nonce have none."""

    def __init__(self, requests: Sequence[Request], width: int, device: torch.device) -> None:
        self._sums_RK = torch.zeros(len(requests), NUMBERS, device=device)
        self._count_R = torch.zeros(len(requests), device=device)
        self._rows = {
            nonce: (
                torch.tensor([row for row, request in enumerate(requests) if request.nonce == nonce], device=device),
                torch.from_numpy(signs(nonce, width)).to(device),
            )
            for nonce in dict.fromkeys(request.nonce for request in requests if request.nonce)
        }

    def add(self, fed_BD: torch.Tensor, row_B: torch.Tensor, position_B: torch.Tensor) -> None:
        """Take in one position of each of the rows that are live."""
        for position in position_B[position_B < POSITIONS].unique().tolist():
            here_B = position_B == position
            self._add_one(fed_BD[here_B], row_B[here_B], position)

    def _add_one(self, fed_BD: torch.Tensor, row_B: torch.Tensor, position: int) -> None:
        self._count_R[row_B] += 1
        unit_BD = torch.nn.functional.normalize(fed_BD, dim=-1)
        for row_S, signs_TDK in self._rows.values():
            is_mine_B = torch.isin(row_B, row_S)
            self._sums_RK[row_B[is_mine_B]] += unit_BD[is_mine_B] @ signs_TDK[position].float()

    def packed(self) -> list[bytes]:
        """The fingerprint of each request, empty where none was asked for."""
        sketch_RK = (self._sums_RK / self._count_R.clamp_min(1)[:, None].sqrt()).cpu().numpy()
        asked = {row for rows, _ in self._rows.values() for row in rows.tolist()}
        return [pack(sketch_K) if row in asked else b"" for row, sketch_K in enumerate(sketch_RK)]


def sketches(fed_ND: torch.Tensor, requests: Sequence[Request], sizes: Sequence[int]) -> list[Floats | None]:
    """The numbers (K,) of rollouts of these sizes, whose positions lie one after the other."""
    signs_of = {nonce: signs(nonce, fed_ND.shape[1]) for nonce in {r.nonce for r in requests if r.nonce}}
    parts = fed_ND.split(list(sizes))
    return [
        _sketch(part_TD[:POSITIONS], signs_of[request.nonce]) if request.nonce else None
        for part_TD, request in zip(parts, requests, strict=True)
    ]


def _sketch(fed_TD: torch.Tensor, signs_TDK: np.ndarray) -> Floats:
    size = len(fed_TD)
    unit_TD = torch.nn.functional.normalize(fed_TD, dim=-1)
    mine_TDK = torch.from_numpy(signs_TDK[:size]).to(fed_TD.device).float()
    return (torch.einsum("td,tdk->k", unit_TD, mine_TDK) / size**0.5).cpu().numpy()
