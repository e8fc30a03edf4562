"""A learner on several processes of this machine, forked from one that has torch: what they come to, as files."""

import math
import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from adapting import batch
from farflung.engine.base import Request
from farflung.engine.loading import build
from farflung.engine.local import LocalEngine
from farflung.learner import checkpoint
from farflung.learner.distributed import DistributedLearner
from farflung.learner.forward import _KINDS, find_kind
from farflung.learner.optimise import Learner, Optimisation
from farflung.learner.pack import Rollout, Segment
from farflung.learner.policy import Policy
from farflung.learner.ranks import Ranks, local
from farflung.protocol.errors import WeightsError
from farflung.protocol.probe import Slice
from farflung.rollouts.agreement import agree
from farflung.rollouts.sharded_engine import FIELDS, Follower, behaviour, maker

WAIT_S = 280.0
IDS = torch.arange(2, 32)[None]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
OPTIONS = {
    "dtype": torch.float32,
    "threads": 1,
    "device": torch.device("cpu"),
    "replay_tokens": 90,  # several passes
    "max_rows": 3,
}
SPARE = 3_000
"""Values of rows that are shared by no number of ranks, and of what is no matrix."""


def on_ranks(world: int, work: Callable[..., None], *given: Any) -> None:
    """Do `work(ranks, *given)` on so many processes; all must end well."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "farflung.trainer"])  # what takes seconds; this file is not on its path
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


def train_row_by_row(ranks: Ranks, folder: Path) -> None:
    """A step with a model that takes one row at a time, on rows that no number of ranks shares evenly."""

    def make() -> Learner:
        one = learner(folder, ranks, 0, torch.float32)
        one.policy._kind = replace(one.policy._kind, can_pad=False, can_share=False)
        return one

    distributed = DistributedLearner(make, folder, microbatch_tokens=15, keep=1, ranks=ranks)
    if ranks.rank:
        return distributed.follow(Follower("cpu", ranks).execute)
    distributed.begin()
    rollouts = [
        Rollout((Segment("prompt", (2, 3, 4 + number)), Segment("model", (5, 6, 7))), 1.0 - number, 1.0)
        for number in range(10)
    ]
    assert distributed.train(rollouts, {}, 0).tokens == 30
    return distributed.end()


def check_as_one(ranks: Ranks, folder: Path) -> None:
    """An engine over all ranks, each of which has its share of it alone, says what the engine of one process says."""
    distributed = DistributedLearner(lambda: None, folder, microbatch_tokens=1, keep=1, ranks=ranks)  # never begun
    if ranks.rank:
        return distributed.follow(Follower("cpu", ranks).execute)
    engine, alone = (make(folder, **OPTIONS) for make in (maker(distributed), LocalEngine.from_folder))
    weights = load_file(folder / "model.safetensors")
    refuses_bad_weights(engine, weights)
    for change in (0.0, 0.02):
        for one in (engine, alone):
            one.load((name, tensor + change) for name, tensor in weights.items())
        says_the_same(engine, alone)
    assert passes(engine) == math.ceil(passes(alone) / ranks.world) < passes(alone)
    agreed, wanted = agree(engine), agree(alone)
    assert (agreed.kind, agreed.ways.reading) == (wanted.kind, wanted.ways.reading)
    survives_a_fault(engine, alone)
    held = sum(local(one).numel() for one in engine.model.parameters())
    assert held <= sum(one.numel() for one in alone.model.parameters()) / ranks.world + SPARE
    return distributed.end()


def passes(engine: LocalEngine) -> int:
    """How often this process goes through its model for some replays."""
    went: list[int] = []
    counting = engine.model.register_forward_hook(lambda *_: went.append(1))
    engine.replay([(Request((2, 3, number), 1, 1.0, 40), range(2, 32)) for number in range(2, 7)], alone=True)
    counting.remove()
    return len(went)


def refuses_bad_weights(engine: LocalEngine, weights: dict[str, torch.Tensor]) -> None:
    """After each of them there is nothing to replay with."""
    name, tensor = next(reversed(weights.items()))
    lacking = {one: some for one, some in weights.items() if one != name}
    every = [{}, lacking, weights | {name: tensor[1:]}, weights | {"stranger": tensor}]
    if HEAD not in weights:
        every.append(weights | {HEAD: weights[EMBEDDING] + 1})  # tied, and torn
    for bad in every:
        with pytest.raises(WeightsError):
            engine.load(bad.items())
        with pytest.raises(WeightsError, match="no complete weights"):
            engine.replay([(Request((3, 4), 1, 1.0, 2), (5, 6))])


def survives_a_fault(engine: LocalEngine, alone: LocalEngine) -> None:
    """A model whose second layer takes one row at a time: ways that fail there, while others wait, are not taken."""

    def refuse(_: Any, given: tuple[torch.Tensor, ...]) -> None:
        if len(given[0]) > 1:
            raise RuntimeError("one row at a time")

    ways = engine.ways
    fault = engine.model.model.layers[1].mlp.register_forward_pre_hook(refuse)
    found = engine.find_ways()
    assert (found.batching, found.reading) == ("alone", "alone")
    del _KINDS[engine.model]  # to be found anew
    assert not find_kind(engine.model).can_pad
    says_the_same(engine, alone)
    fault.remove()
    says_the_same(engine, alone)
    assert engine.find_ways() == ways


def says_the_same(engine: LocalEngine, alone: LocalEngine) -> None:
    """Ids, replays of them and of other ids, log-probabilities as the learner finds them, and slices of the weights."""
    asked = [
        Request(tuple(range(2, 5 + number % 4)), number, (1.0, 0.7, 0.0)[number % 3], 3 + number % 5)
        for number in range(13)
    ]
    said = [one.ids for one in alone.generate(asked) if one is not None]
    assert [one.ids for one in engine.generate(asked) if one is not None] == said
    sent = [(), *((9, *ids) if len(ids) == 4 else ids for ids in said[1:])]
    items = list(zip(asked, sent, strict=True))
    for is_alone in (False, True):
        found, wanted = (one.replay(items, alone=is_alone) for one in (engine, alone))
        for one, other in zip(found, wanted, strict=True):
            for name in FIELDS:
                np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-5, rtol=1e-5)
            np.testing.assert_array_equal(one.margin > 0, other.margin > 0)
        assert sum((one.margin > 0).sum() for one in found) > 2, "some tokens are not what their seeds give"
    assert engine.replay([]) == []
    rollouts = [Rollout((Segment("prompt", one.prompt_ids), Segment("model", ids)), 1.0, 1.0) for one, ids in items]
    known, expected = (behaviour(one, rollouts, range(len(rollouts)), 60) for one in (engine, alone))
    assert known.keys() == expected.keys()
    assert len(known) == len(rollouts) - 1
    for index, logp in expected.items():
        torch.testing.assert_close(known[index], logp, atol=1e-5, rtol=1e-5)
    slices = [Slice(name, 3, 9) for name in alone.model.state_dict() if "norm" not in name]
    assert engine.values(slices) == alone.values(slices)
