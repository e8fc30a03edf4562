"""Training over several processes: parameters, gradients and optimizer are sharded (FSDP2) when torchrun starts them.

Every rank packs the same micro-batches and takes its share of them; gradients add up in the reduction.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

PATIENCE_H = 6.0
"""How long ranks wait for rank 0, which may be uploading weights; one that dies ends the others at once."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which process this is, of how many."""

    rank: int = 0
    world: int = 1

    @property
    def is_alone(self) -> bool:
        return self.world == 1

    @property
    def local_rank(self) -> int:
        """Which process of this machine it is: the number of its device."""
        return int(os.environ.get("LOCAL_RANK", "0"))


def join() -> Ranks:
    """Meet the other processes that torchrun started; alone if it started none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=PATIENCE_H))
    return Ranks(dist.get_rank(), dist.get_world_size())


def shard(model: PreTrainedModel) -> None:
    """Shard a model over all ranks, layer by layer, in place."""
    layers = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)


def split(parts: Sequence[Any], ranks: Ranks) -> list[tuple[Any, bool]]:
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
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def broadcast(data: bytes, ranks: Ranks) -> bytes:
    """Rank 0's bytes, on every rank; the other ranks' bytes are not looked at."""
    if ranks.is_alone:
        return data
    size = torch.tensor([len(data)], dtype=torch.int64)
    dist.broadcast(size, 0)
    sent = torch.frombuffer(bytearray(data), dtype=torch.uint8) if ranks.rank == 0 and data else None
    box = torch.empty(int(size), dtype=torch.uint8) if sent is None else sent
    dist.broadcast(box, 0)
    return box.numpy().tobytes()


def broadcast_text(text: str, ranks: Ranks) -> str:
    """Rank 0's text, on every rank."""
    return broadcast(text.encode(), ranks).decode()


def meet(ranks: Ranks) -> None:
    """Wait for all ranks."""
    if not ranks.is_alone:
        dist.barrier()


def leave(ranks: Ranks) -> None:
    """Leave the others when all is done; left to the interpreter's end, gloo's threads may abort the process."""
    if not ranks.is_alone:
        dist.destroy_process_group()


def add_up(values: Sequence[float], ranks: Ranks, *, is_most: bool = False) -> list[float]:
    """Sums over all ranks, or the largest of each."""
    if ranks.is_alone:
        return list(values)
    found = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX if is_most else dist.ReduceOp.SUM)
    return found.tolist()
