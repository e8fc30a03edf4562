"""How near a trainer's weights are to those that it published, where its machine repeats no step to the bit."""

from collections.abc import Iterable, Mapping

import torch

Named = tuple[str, torch.Tensor]


def share_differing(published: Mapping[str, torch.Tensor], own: Iterable[Named]) -> float:
    """Share of values that were published otherwise; 1 where tensors or shapes are others."""
    values = differing = 0
    names: set[str] = set()
    for name, tensor in own:
        names.add(name)
        if name not in published or published[name].shape != tensor.shape:
            return 1.0
        values += tensor.numel()
        differing += int((published[name] != tensor.cpu()).sum())
    return differing / max(1, values) if names == set(published) else 1.0
