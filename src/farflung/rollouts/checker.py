"""Trainer: an engine beside the learner's, and its findings on a batch: texts that trip, and earlier log-probabilities.

It is the only judge in the trainer's process, and it judges texts alone: text that trips goes to a validator.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

import torch

from farflung.audits.tripwire import Looked, inspect, tripped
from farflung.config import Config
from farflung.engine.base import Request
from farflung.engine.local import LocalEngine
from farflung.learner.pack import Rollout
from farflung.net.session import Session
from farflung.protocol import wire
from farflung.protocol.messages import Batch, RolloutLook
from farflung.protocol.numerics import Quantiser
from farflung.rollouts import stale
from farflung.rollouts.agreement import Agreement, agree
from farflung.rollouts.batch import Bodies, Suspect, suspects, trip
from farflung.rollouts.sharded_engine import behaviour
from farflung.trust.profiles import load_profiles

log = logging.getLogger(__name__)
Retry = Callable[[str, Callable[[], Awaitable[object]]], Awaitable[None]]
"""Writes something, once the disk has room for it; the first argument names it to people."""


class Held(Protocol):
    """An engine and the version that it holds (`weights/loaded.py`: flows do not import each other)."""

    engine: LocalEngine

    async def fetch(self, digest: str, quantiser: Quantiser = "") -> None:
        """Have a version on disk, unless the engine holds it, quantised so."""
        ...

    def ensure(self, digest: str, *, quantiser: Quantiser = "") -> None:
        """Have a version that was fetched in the engine, quantised so."""
        ...

    def invalidate(self) -> None:
        """Let the engine count as holding nothing that anybody knows."""
        ...


class Checker:
    """Replays what is to be trained on under the weights that it was leased at."""

    def __init__(self, session: Session, config: Config, held: Held, bodies: Bodies, retry: Retry) -> None:
        self._session, self._held, self._bodies, self._retry = session, held, bodies, retry
        self._learn, self._max_new_tokens = config.learn, config.generate.max_new_tokens
        self._folder = config.folder / "checkpoints" / "behaviour"
        self._profiles = load_profiles(config.model)
        self._is_mixed = any(one.quantiser for one in self._profiles.every)
        """Whether some nodes may generate with other weights than are published."""
        self._seen: dict[str, torch.Tensor] = {}
        """By rollout of the batch looked at last, what its tokens were worth, float32 (N,)."""

    def agree(self, weights: Callable[[], Iterable[tuple[str, torch.Tensor]]]) -> Agreement:
        """Try the model with these weights. Raises ConfigError if it does not say the same on every node."""
        with self._session.stats.working():
            self._held.invalidate()
            self._held.engine.load(weights())
            return agree(self._held.engine)

    async def trip(self, batch: Batch) -> int:
        """Replay a batch, and have what is not what its seeds give taken out; gives 0 if the batch stays as it is.

        Several updates need to know what every rollout was worth before the first, so then none is left out; nor where
        some were generated with quantised weights, under which they are replayed too.
        """
        every = await suspects(self._bodies, batch, is_all=self._needs_all)
        found: list[Looked] = []
        for digest, quantiser in sorted({(one.manifest, self._quantiser(one.profile)) for one in every}):
            await self._fetch(digest, quantiser)
            part = [one for one in every if (one.manifest, self._quantiser(one.profile)) == (digest, quantiser)]
            found += await asyncio.to_thread(self._inspect, digest, quantiser, part, batch.temperature)
        self._seen = {one.rollout: one.logp for one in found}
        looked = [RolloutLook(rollout=one.rollout, **one.flips._asdict()) for one in found]
        if caught := tripped((one.submission, one.log_ratios) for one in found if not one.is_audited):
            log.warning("tripwire step=%d submissions=%d", batch.step, len(caught))
        return len(caught) + await trip(self._session, batch.step, caught, looked)

    async def behaviour(self, batch: Batch, rollouts: Sequence[Rollout]) -> stale.Logp:
        """The log-probabilities of rollouts under the weights they were leased at; of a committed step, as it was then.

        Stale ones must be known, fresh ones serve several updates. The tripwire has found out already; but where it
        leaves out what was audited, chance decides what is replayed together, and so would it decide the last bits.
        """
        by_step = stale.stale(rollouts, batch.step - 1)
        if not self._needs_all and not (by_step and self._learn.importance_cap):
            return {}
        if batch.committed:
            return stale.stored(self._folder, batch.step)
        logp = self._known(batch)
        if not self._learn.importance_cap:  # stale tokens count as they are
            logp, by_step = {i: values for i, values in logp.items() if rollouts[i].step not in by_step}, {}
        for step, digest in {group.step: group.manifest for group in batch.groups if group.step in by_step}.items():
            if missing := [index for index in by_step[step] if index not in logp]:
                await self._fetch(digest)
                logp |= await asyncio.to_thread(self._replayed, digest, rollouts, missing)
        keep = partial(asyncio.to_thread, stale.keep, logp, self._folder, batch.step)
        await self._retry("what rollouts were worth before", keep)
        return logp

    def answer(self, batch: Batch) -> tuple[list[bytes], list[bytes]]:
        """Ids that the weights in the engine give to the batch's canaries, and their log-probabilities, packed."""
        asked = [
            Request(tuple(wire.unpack_ids(one.prompt_ids).tolist()), one.seed, batch.temperature, one.max_new_tokens)
            for one in batch.canaries
        ]
        made = [done for done in self._held.engine.generate(asked) if done is not None]
        return [wire.pack_ids(done.ids) for done in made], [wire.pack_floats(done.logp) for done in made]

    def _known(self, batch: Batch) -> stale.Logp:
        """The tripwire's log-probabilities of a batch's rollouts, which several updates may use."""
        if not self._needs_all:
            return {}
        names = [rollout.rollout for group in batch.groups for rollout in group.rollouts]
        return {index: self._seen[name] for index, name in enumerate(names) if name in self._seen}

    @property
    def _needs_all(self) -> bool:
        """Whether the learner needs what every rollout was worth, and not stale ones alone."""
        return self._learn.minibatches > 1 or self._is_mixed

    def _quantiser(self, profile: str) -> Quantiser:
        return self._profiles.of(profile).quantiser

    def _inspect(self, digest: str, quantiser: Quantiser, part: list[Suspect], temperature: float) -> list[Looked]:
        with self._session.stats.working():
            self._held.ensure(digest, quantiser=quantiser)
            return inspect(self._held.engine, part, temperature, self._max_new_tokens, self._profiles)

    def _replayed(self, digest: str, rollouts: Sequence[Rollout], which: list[int]) -> stale.Logp:
        with self._session.stats.working():
            self._held.ensure(digest)
            return behaviour(self._held.engine, rollouts, which, self._learn.microbatch_tokens)

    async def _fetch(self, digest: str, quantiser: Quantiser = "") -> None:
        await self._retry("weights", lambda: self._held.fetch(digest, quantiser))
