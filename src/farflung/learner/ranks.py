"""Training over several processes: parameters, gradients and optimizer are sharded (FSDP2) when torchrun starts them.

Every rank packs the same micro-batches and takes its share of them; gradients add up in the reduction.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from farflung.numerics.rounding import dithered

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


def shard(
    model: PreTrainedModel, device: torch.device, dtype: torch.dtype = torch.float32, *, is_dithered: bool = False
) -> None:
    """Shard a model over all ranks, layer by layer, in place; in a shorter type it computes with what is published.

    In float32 nothing is cast, so a model that has a shorter type computes in that.

    All of it is a shard again after each pass: a root that stays whole would give its weights for its masters.
    """
    mesh, is_mixed = init_device_mesh(device.type, (dist.get_world_size(),)), dtype != torch.float32
    policy = MixedPrecisionPolicy(dtype, torch.float32) if is_mixed else MixedPrecisionPolicy()
    layers = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    if not is_mixed:
        return
    for name, parameter in model.named_parameters():
        shard = parameter._local_tensor  # the tensor itself, which FSDP asks; no copy, no view
        if "lora_" in name:
            _gather_as(lambda values, start: values, shard)
        elif parameter.dtype == torch.float32 and is_dithered:
            _gather_as(dithered, shard)


def _gather_as(change: Callable[[torch.Tensor, int], torch.Tensor], shard: torch.Tensor) -> None:
    """Have FSDP send a shard as a function of it and of how many values come before, not rounded to the nearest.

    FSDP asks a shard for both functions here, and wants what the last ranks send to be as long as the first one's.
    """

    def before(
        mesh: DeviceMesh, shape: torch.Size, stride: Any, module: Any, policy: Any
    ) -> tuple[tuple[torch.Tensor], None]:
        rows, start = _rows(shape[0], mesh)
        sent = change(shard.detach(), start * math.prod(shape[1:]))
        missing = rows - len(sent)
        return (torch.cat([sent, sent.new_zeros(missing, *shape[1:])]) if missing else sent,), None

    def after(
        gathered: tuple[torch.Tensor], metadata: None, dtype: torch.dtype, *, out: torch.Tensor | None = None
    ) -> Any:
        return None if out is not None else (gathered[0], gathered)

    shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather = before, after


def split(parts: Sequence[Any], ranks: Ranks) -> list[tuple[Any, bool]]:
    """This rank's share, and of each part whether it counts.

    All ranks get equally many, or the others would wait for ever: some get one that another rank counts.
    """
    own = [(part, True) for part in parts[ranks.rank :: ranks.world]]
    return own if len(own) == -(-len(parts) // ranks.world) else [*own, (parts[-1], False)]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all its shards; every rank must ask, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: torch.Tensor) -> tuple[int, int | None]:
    """Which rows of a tensor this rank has; all of one that is not sharded."""
    if not isinstance(tensor, DTensor):
        return 0, None
    rows, start = _rows(tensor.shape[0], tensor.device_mesh)
    return start, min(start + rows, tensor.shape[0])


def _rows(height: int, mesh: DeviceMesh) -> tuple[int, int]:
    """How many rows of so many the first rank has, and the first row that this one has."""
    rows = -(-height // mesh.size())
    return rows, min(mesh.get_local_rank() * rows, height)


def share_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor cut as another one is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def take(slot: torch.Tensor, tensor: torch.Tensor | None) -> None:
    """Fill a parameter with a tensor that rank 0 has whole; the others give None, and all must ask."""
    sent = torch.empty(slot.shape, dtype=slot.dtype, device=slot.device)
    if tensor is not None:
        sent.copy_(tensor)
    if isinstance(slot, DTensor):
        cut = distribute_tensor(sent, slot.device_mesh, slot.placements, src_data_rank=0)
        slot.detach().to_local().copy_(cut.to_local())
    else:
        dist.broadcast(sent, 0)
        slot.copy_(sent)


def like(share: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """This rank's share of a tensor that is cut as another one of its shape is; the share itself if that is whole."""
    if not isinstance(other, DTensor):
        return share
    mesh, shape = other.device_mesh, other.shape
    return DTensor.from_local(share, mesh, other.placements, run_check=False, shape=shape, stride=other.stride())


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
