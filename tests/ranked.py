"""A learner on several processes of this machine, forked from one that has torch: what they come to, as files."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from adapting import batch
from farflung.engine.loading import build
from farflung.learner import checkpoint
from farflung.learner.optimise import Learner, Optimisation
from farflung.learner.policy import Policy
from farflung.learner.ranks import Ranks

WAIT_S = 280.0
IDS = torch.arange(2, 32)[None]


def on_ranks(world: int, work: Callable[..., None], *given: Any) -> None:
    """Do `work(ranks, *given)` on so many processes; all must end well."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranked"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(rank, world, port, work, given)) for rank in range(world)]
    for one in ranks:
        one.start()
    try:
        for one in ranks:
            one.join(WAIT_S)
        assert [one.exitcode for one in ranks] == [0] * world
    finally:
        for one in ranks:
            one.kill()


def _rank(rank: int, world: int, port: int, work: Callable[..., None], given: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    work(Ranks(rank, world), *given)
    dist.destroy_process_group()


def learner(
    folder: Path,
    ranks: Ranks,
    lora_rank: int,
    dtype: torch.dtype,
    *,
    is_checkpointed: bool = False,
    are_moments_on_host: bool = False,
) -> Learner:
    torch.manual_seed(7)
    policy = Policy.from_pretrained(
        folder,
        compute_dtype=dtype,
        is_dithered=True,
        ranks=ranks,
        lora_rank=lora_rank,
        is_checkpointed=is_checkpointed,
    )
    return Learner(policy, Optimisation(lr=3e-3, minibatches=2, are_moments_on_host=are_moments_on_host))


def agrees(of: Learner, folder: Path) -> bool:
    """Whether the policy's logits are, bit for bit, those of its published weights on a worker; on all ranks."""
    worker = build(folder, torch.bfloat16)
    with torch.no_grad():
        slots = worker.state_dict(keep_vars=True)
        for name, tensor in of.policy.tensors():
            slots[name].copy_(tensor)
        own, said = of.policy.model(input_ids=IDS, use_cache=False), worker(input_ids=IDS, use_cache=False)
    return torch.equal(own.logits, said.logits)


def compute_as_published(ranks: Ranks, folder: Path, lora_rank: int) -> None:
    """Before and after updates, with checkpointed activations and moments in host memory on an even number of ranks."""
    is_even = ranks.world % 2 == 0
    one = learner(folder, ranks, lora_rank, torch.bfloat16, is_checkpointed=is_even, are_moments_on_host=is_even)
    assert one.policy.can_share
    before = [tensor.clone() for _, tensor in one.policy.tensors()]
    assert agrees(one, folder), "before the first step"
    for number in range(2):
        one.step(batch(number))
        assert agrees(one, folder), f"after step {number}"
    assert any(not torch.equal(tensor, was) for (_, tensor), was in zip(one.policy.tensors(), before, strict=True))


def train(ranks: Ranks, folder: Path, lora_rank: int, dtype: torch.dtype, root: Path, first: int, last: int) -> None:
    """Go on from the checkpoint of the step before `first` to that of `last`; losses are kept beside it."""
    one, losses = learner(folder, ranks, lora_rank, dtype), []
    if first:
        assert checkpoint.load(one, root / f"step-{first - 1:06d}") == first - 1
    for number in range(first, last + 1):
        found = one.step(batch(number))
        losses.append([found.loss, found.grad_norm, found.entropy])
    checkpoint.save(one, last, root, keep=9)
    if ranks.rank == 0:
        torch.save(losses, root / f"losses-{last}")
