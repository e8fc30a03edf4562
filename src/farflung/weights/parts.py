"""Large tensors in parts: slices along the first dimension that each fit a shard, and are joined where they are loaded.

They are named `NAME[0]`, `NAME[1]`, … So no body that crosses a machine grows with the model: the embedding of a 32B
model has 1.6 GB.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

import torch

from farflung.protocol.errors import WeightsError

PART_BYTES = 32 << 20
Named = tuple[str, torch.Tensor]
_PART = re.compile(r"(.+)\[(\d{1,6})\]")


def split(tensors: Iterable[Named]) -> Iterator[Named]:
    """The tensors, those that are larger than a shard as views of their parts."""
    for name, tensor in tensors:
        if tensor.nbytes <= PART_BYTES or not tensor.dim():
            yield name, tensor
            continue
        rows = max(1, PART_BYTES // (tensor.nbytes // len(tensor)))
        for number, part in enumerate(tensor.split(rows)):
            yield f"{name}[{number}]", part


def joined(tensors: Iterable[Named]) -> Iterator[Named]:
    """The same as it was before `split`. Raises WeightsError where a part is missing or out of its order."""
    whole, parts = "", list[torch.Tensor]()
    for name, tensor in tensors:
        found = _PART.fullmatch(name)
        base, number = (found[1], int(found[2])) if found else ("", 0)
        if parts and (not found or base != whole):
            yield whole, torch.cat(parts)
            parts = []
        if not found:
            yield name, tensor
            continue
        if number != len(parts):
            raise WeightsError(f"tensor {base} has part {number} where part {len(parts)} should come")
        whole = base
        parts.append(tensor)
    if parts:
        yield whole, torch.cat(parts)


def whole_shapes(shapes: Iterable[tuple[str, Sequence[int]]]) -> Iterator[tuple[str, Sequence[int]]]:
    """Names and shapes of the tensors that parts make up, in the same order."""
    held: dict[str, Sequence[int]] = {}
    for name, shape in shapes:
        found = _PART.fullmatch(name)
        base = found[1] if found else name
        held[base] = [held[base][0] + shape[0], *shape[1:]] if found and base in held else shape
    yield from held.items()
