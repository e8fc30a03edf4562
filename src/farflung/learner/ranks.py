"""Training over several processes: parameters, gradients and optimizer are sharded (FSDP2) when torchrun starts them.

Every rank packs the same micro-batches and takes its share of them; gradients add up in the reduction.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which process this is, of how many."""

    rank: int = 0
    world: int = 1

    @property
    def is_alone(self) -> bool:
        return self.world == 1


def join() -> Ranks:
    """Meet the other processes that torchrun started; alone if it started none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size())


def shard(model: PreTrainedModel) -> None:
    """Shard a model over all ranks, layer by layer, in place."""
    layers = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)


def deal(parts: Sequence[Any], ranks: Ranks) -> list[tuple[Any, bool]]:
    """This rank's share, and of each part whether it counts.

    All ranks get equally many, or the others would wait for ever: some get one that another rank counts.
    """
    own = [(part, True) for part in parts[ranks.rank :: ranks.world]]
    return own if len(own) == -(-len(parts) // ranks.world) else [*own, (parts[0], False)]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all its shards; every rank must ask, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor cut as another one is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def told(text: str, ranks: Ranks) -> str:
    """Rank 0's text, on every rank."""
    box = [text]
    if not ranks.is_alone:
        dist.broadcast_object_list(box)
    return box[0]


def meet(ranks: Ranks) -> None:
    """Wait for all ranks."""
    if not ranks.is_alone:
        dist.barrier()


def add_up(values: Sequence[float], ranks: Ranks, *, is_most: bool = False) -> list[float]:
    """Sums over all ranks, or the largest of each."""
    if ranks.is_alone:
        return list(values)
    found = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX if is_most else dist.ReduceOp.SUM)
    return found.tolist()
