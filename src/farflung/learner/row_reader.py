"""Tensors in safetensors files, whole or in pieces along their first dimension, and any rows of them.

A rank of several takes its own share of a model, or of a checkpoint that another number of ranks wrote.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open


class RowReader:
    """The tensors of some files; pieces of one name follow each other in the order of the files."""

    def __init__(self, files: Iterable[Path], rename: Mapping[str, str] | None = None) -> None:
        """Open the files. `rename` has names that a file gives to tensors which are asked for by others."""
        self._open = ExitStack()
        self._pieces: dict[str, list[Any]] = {}
        for path in files:
            file = self._open.enter_context(safe_open(path, "pt"))
            for name in file.keys():  # noqa: SIM118 - no mapping
                self._pieces.setdefault((rename or {}).get(name, name), []).append(file.get_slice(name))
        self.shapes = {name: _shape([tuple(one.get_shape()) for one in some]) for name, some in self._pieces.items()}
        """The shape of each tensor with all its pieces, by name."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pieces.clear()
        self._open.close()

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of a tensor; of a scalar all there is, which every piece repeats."""
        pieces = self._pieces[name]
        if not pieces[0].get_shape():
            return pieces[0][...]
        found, at = [], 0
        for piece in pieces:
            height = piece.get_shape()[0]
            first, last = max(start - at, 0), height if stop is None else min(stop - at, height)
            if first < last:
                found.append(piece[first:last])
            at += height
        return torch.cat(found or [pieces[0][:0]]) if len(found) != 1 else found[0]


def _shape(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()
