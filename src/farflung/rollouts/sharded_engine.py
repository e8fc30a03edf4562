"""Trainer on several ranks: the engine that checks batches, sharded over them as the learner is.

Rank 0 alone tries the model and generates. As its pass comes to a layer, the others help to put that together and do no
more, so what fails there leaves nobody waiting. Replays are nearly all of the work, and dealt out: each rank reads its
share of the texts. Ranks exchange msgpack of the structs below.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from farflung.engine.base import Replay, Request
from farflung.engine.loading import build, load_strictly, read_slices
from farflung.engine.local import LocalEngine
from farflung.engine.replay import Reading, refuse_strangers, replay
from farflung.learner.distributed import DistributedLearner
from farflung.learner.forward import Kind, find_kind
from farflung.learner.pack import Rollout
from farflung.learner.ranks import Ranks, shard, split, take, whole
from farflung.numerics.devices import pick
from farflung.protocol.probe import Slice
from farflung.rollouts import stale

FIELDS = [field.name for field in fields(Replay)]
Items = Sequence[tuple[Request, Sequence[int]]]


class Command(msgspec.Struct, frozen=True, tag=True):
    """The next work of all ranks."""


class Build(Command, frozen=True):
    """Make the model, its weights yet to come."""

    config: bytes
    dtype: str
    threads: int


class Assemble(Command, frozen=True):
    """Put a layer together that rank 0 computes with."""

    number: int


class Take(Command, frozen=True):
    """Take the rows of a tensor that rank 0 has."""

    name: str


class Show(Command, frozen=True):
    """Put a tensor together."""

    name: str


class Read(Command, frozen=True):
    """Replay a share of these."""

    items: tuple[tuple[Request, tuple[int, ...]], ...]
    tokens: int
    reading: Reading


class Weigh(Command, frozen=True):
    """Find the log-probabilities of a share of these, as the learner does."""

    rollouts: tuple[Rollout, ...]
    tokens: int
    kind: Kind


class Shards:
    """One rank's part of the model. What all ranks are to do, they do in the same order."""

    def __init__(self, model: PreTrainedModel, device: torch.device, ranks: Ranks) -> None:
        shard(model, device)
        self.model, self._ranks = model, ranks
        self.layers = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._slots = model.state_dict(keep_vars=True)
        for layer in self.layers:  # made in inference mode, tensors that it gathers into could be used in no other
            layer.unshard()
            layer.reshard()

    @torch.no_grad()
    def execute(self, command: Command) -> None:
        """Do what rank 0 has told of."""
        match command:
            case Assemble(number=number):
                self.layers[number].unshard()
                self.layers[number].reshard()
            case Take(name=name):
                take(self._slots[name], None)
            case Show(name=name):
                whole(self._slots[name].detach())
            case Read(items=items, tokens=tokens, reading=reading):
                self.read(items, tokens, reading)
            case Weigh(rollouts=rollouts, tokens=tokens, kind=kind):
                self.weigh(rollouts, tokens, kind)

    @torch.no_grad()
    def read(self, items: Items, tokens: int, reading: Reading) -> list[Replay]:
        """Replays of all items; this rank reads its share."""
        own = replay(self.model, items, tokens, reading, partial(split, ranks=self._ranks))
        parts = [torch.from_numpy(np.stack([getattr(one, name) for name in FIELDS])) for one in own]
        return [Replay(*part_5N.numpy()) for part_5N in _added(parts)]

    @torch.no_grad()
    def weigh(self, rollouts: Sequence[Rollout], tokens: int, kind: Kind) -> stale.Logp:
        """Log-probabilities of all rollouts; this rank finds its share."""
        own = stale.behaviour(self.model, rollouts, range(len(rollouts)), tokens, kind=kind, ranks=self._ranks)
        return dict(zip(own, _added(list(own.values())), strict=True))


def _added(parts: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Sums over all ranks of tensors that differ in their last dimension alone."""
    if not parts:
        return parts
    found = torch.cat(list(parts), -1)
    dist.all_reduce(found)
    return found.split([part.shape[-1] for part in parts], -1)


class Follower:
    """The part of any rank but the first."""

    def __init__(self, device: str, ranks: Ranks) -> None:
        self._device, self._ranks = device, ranks
        self._shards: Shards

    def execute(self, data: bytes) -> None:
        """Do what rank 0 says."""
        command = msgspec.msgpack.decode(data, type=Build | Assemble | Take | Show | Read | Weigh)
        if not isinstance(command, Build):
            return self._shards.execute(command)
        torch.set_num_threads(command.threads)
        model = build(command.config, getattr(torch, command.dtype))
        self._shards = Shards(model, pick(self._device, self._ranks.local_rank), self._ranks)


class ShardedEngine(LocalEngine):
    """The engine of rank 0, whose calls are done by all."""

    def __init__(self, shards: Shards, tell: Callable[[bytes], None], **options: Any) -> None:
        super().__init__(shards.model, **options)
        self._is_loaded = self._is_dealt = False
        self._shards, self._tell_bytes = shards, tell
        for number, layer in enumerate(shards.layers):
            layer.register_forward_pre_hook(partial(self._before, number), prepend=True)

    @classmethod
    def over(
        cls,
        distributed: DistributedLearner,
        config: Path | str | bytes,
        *,
        dtype: torch.dtype,
        threads: int,
        device: torch.device,
        **options: Any,
    ) -> "ShardedEngine":
        """As `LocalEngine.from_folder`, on the ranks of a learner."""
        torch.set_num_threads(threads)
        text = config if isinstance(config, bytes) else (Path(config) / "config.json").read_bytes()
        model = build(text, dtype)
        distributed.tell_beside(msgspec.msgpack.encode(Build(text, str(dtype).removeprefix("torch."), threads)))
        return cls(Shards(model, device, distributed.ranks), distributed.tell_beside, **options)

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights, of which each rank keeps its rows; errors are those of one process."""
        self._is_loaded = False
        load_strictly(self.model, tensors, self._put, self._whole)
        self._is_loaded = True

    def values(self, slices: Sequence[Slice]) -> bytes:
        """These slices of the weights in bfloat16."""
        self._refuse_unloaded()
        return read_slices(self.model.state_dict(), slices, self._whole)

    def replay(self, items: Items, *, alone: bool = False) -> list[Replay]:
        """Prefill each (request, completion ids) once, on any rank, and compare each token with the seeded pick."""
        self._refuse_unloaded()
        refuse_strangers(self.model, items)
        told = Read(
            tuple((request, tuple(ids)) for request, ids in items),
            self.replay_tokens,
            "alone" if alone else self.ways.reading,
        )
        with self._dealt(told):
            return self._shards.read(told.items, told.tokens, told.reading)

    def behaviour(self, rollouts: Sequence[Rollout], tokens: int) -> stale.Logp:
        """Log-probabilities of rollouts as the learner finds them, each on any rank.

        Where rows go through the model one by one, a micro-batch is one row: all ranks have equally many passes.
        """
        kind = find_kind(self.model)
        told = Weigh(tuple(rollouts), tokens if kind.can_pad else 1, kind)
        with self._dealt(told):
            return self._shards.weigh(told.rollouts, told.tokens, told.kind)

    @contextmanager
    def _dealt(self, command: Command) -> Iterator[None]:
        """All ranks have passes of their own, as many as this one."""
        self._tell(command)
        self._is_dealt = True
        try:
            yield
        finally:
            self._is_dealt = False

    def _before(self, number: int, *_: Any) -> None:
        """The pass comes to a layer: one that a pass which failed has left whole is put together once more."""
        self._shards.layers[number].reshard()
        if not self._is_dealt:
            self._tell(Assemble(number))

    def _put(self, name: str, slot: torch.Tensor, tensor: torch.Tensor) -> None:
        self._tell(Take(name))
        take(slot, tensor)

    def _whole(self, name: str, slot: torch.Tensor) -> torch.Tensor:
        self._tell(Show(name))
        return whole(slot.detach())

    def _tell(self, command: Command) -> None:
        self._tell_bytes(msgspec.msgpack.encode(command))


def maker(distributed: DistributedLearner) -> Callable[..., LocalEngine]:
    """Makes an engine of a config.json: on all ranks of a learner, or here if it is alone."""
    return LocalEngine.from_folder if distributed.ranks.is_alone else partial(ShardedEngine.over, distributed)


def behaviour(engine: LocalEngine, rollouts: Sequence[Rollout], which: Sequence[int], tokens: int) -> stale.Logp:
    """As `stale.behaviour`, by all ranks that hold the engine."""
    if not isinstance(engine, ShardedEngine):
        return stale.behaviour(engine.model, rollouts, which, tokens)
    found = engine.behaviour([rollouts[index] for index in which], tokens)
    return {which[place]: logp_N for place, logp_N in found.items()}
