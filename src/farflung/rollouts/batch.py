"""Trainer: claim a step's batch, fetch its tokens, turn groups into rollouts with advantages.

Rewards come from the coordinator, tokens by digest; a worker's log-probabilities ride along as a metric.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

import msgspec
import torch

from farflung.audits.tripwire import Suspect
from farflung.learner.loss import advantages
from farflung.learner.pack import Rollout, Segment
from farflung.net.session import Session
from farflung.protocol import wire
from farflung.protocol.digest import digest_of
from farflung.protocol.errors import WeightsError
from farflung.protocol.messages import (
    Batch,
    BatchAnswer,
    BatchGroup,
    ClaimStep,
    Done,
    RolloutLook,
    SubmissionBody,
    SubmittedRollout,
    Trips,
)

AT_ONCE = 16
MOST_BYTES = 512 << 20
"""Bodies that are kept from the tripwire to the learner."""


async def claim(session: Session, step: int, wait_s: float) -> BatchAnswer:
    """The batch of a step, or why there is none yet."""
    answer = await session.client.post(session.path(f"steps/{step}/claim"), ClaimStep(wait_s=wait_s), BatchAnswer)
    session.latest = answer.latest
    return answer


async def trip(session: Session, step: int, submissions: Sequence[str], looked: Sequence[RolloutLook]) -> int:
    """Report submissions that must not be trained on before they are audited, and what each replay found.

    Gives 0 if the batch stays as it is.
    """
    trips = Trips(submissions=list(submissions), looked=list(looked))
    return (await session.client.post(session.path(f"steps/{step}/trip"), trips, Done)).changed


class Bodies:
    """The submissions of the step in hand, each downloaded once: the tripwire reads them, then the learner."""

    def __init__(self, session: Session, most_bytes: int = MOST_BYTES) -> None:
        self.session, self._most_bytes = session, most_bytes
        self._kept: dict[str, bytes] = {}
        """Bodies that were downloaded, as they came; those that do not fit are downloaded again."""
        self._size_bytes = 0

    def only(self, batch: Batch) -> None:
        """Let go of what is not of this batch."""
        digests = {rollout.submission for group in (*batch.groups, *batch.spare) for rollout in group.rollouts}
        self._kept = {digest: body for digest, body in self._kept.items() if digest in digests}
        self._size_bytes = sum(map(len, self._kept.values()))

    def forget(self) -> None:
        """Let go of everything."""
        self._kept, self._size_bytes = {}, 0

    async def read(self, digests: Iterable[str]) -> dict[str, list[SubmittedRollout]]:
        """The rollouts of submissions. Raises WeightsError for bytes that do not hash to their name."""
        bodies = await _each(digests, self._body)
        return {digest: msgspec.msgpack.decode(body, type=SubmissionBody).rollouts for digest, body in bodies.items()}

    async def logp(self, found: Mapping[str, list[SubmittedRollout]]) -> dict[str, tuple[float, ...]]:
        """By rollout, the log-probabilities that its node claimed, where it did."""
        claimed = await _each(found, lambda digest: self._download(f"{digest}/logp"))
        return {
            rollout.rollout: tuple(wire.unpack_floats(values).tolist())
            for digest, body in claimed.items()
            if body
            for rollout, values in zip(found[digest], msgspec.msgpack.decode(body, type=list[bytes]), strict=True)
        }

    async def _body(self, digest: str) -> bytes:
        if digest in self._kept:
            return self._kept[digest]
        body = await self._download(digest)
        if digest_of(body) != digest:
            raise WeightsError(f"submission {digest[:12]} does not hash to its name; the blob store is damaged")
        if self._size_bytes + len(body) <= self._most_bytes:
            self._kept[digest] = body
            self._size_bytes += len(body)
        return body

    async def _download(self, name: str) -> bytes:
        return await self.session.client.download(self.session.path(f"submissions/{name}"), signed=True)


async def _each(digests: Iterable[str], get: Callable[[str], Awaitable[bytes]]) -> dict[str, bytes]:
    """The answer of `get` for each digest, a few at a time."""
    limit = asyncio.Semaphore(AT_ONCE)

    async def one(digest: str) -> tuple[str, bytes]:
        async with limit:
            return digest, await get(digest)

    return dict(await asyncio.gather(*(one(digest) for digest in sorted(digests))))


def _tokens(found: Mapping[str, list[SubmittedRollout]]) -> dict[str, tuple[int, ...]]:
    return {r.rollout: tuple(wire.unpack_ids(r.ids).tolist()) for rollouts in found.values() for r in rollouts}


async def suspects(bodies: Bodies, batch: Batch, *, is_all: bool) -> list[Suspect]:
    """Every rollout of a batch that no audit has replayed in full, or simply every one, as the tripwire needs it."""
    groups = [*batch.groups, *batch.spare]
    every = [(group, rollout) for group in groups for rollout in group.rollouts if is_all or not rollout.is_audited]
    bodies.only(batch)
    tokens = _tokens(await bodies.read({rollout.submission for _, rollout in every}))
    return [
        Suspect(
            rollout.rollout,
            group.manifest,
            rollout.submission,
            tuple(wire.unpack_ids(group.prompt_ids).tolist()),
            rollout.seed,
            tokens[rollout.rollout],
            rollout.is_audited,
            rollout.profile,
        )
        for group, rollout in every
    ]


async def fetch(bodies: Bodies, batch: Batch, *, divide_by_std: bool) -> list[Rollout]:
    """Every rollout of a batch, in its order, with tokens, advantage and claimed log-probabilities."""
    digests = {rollout.submission for group in batch.groups for rollout in group.rollouts}
    bodies.only(batch)
    found = await bodies.read(digests)
    bodies.forget()  # they are not read again before the next step
    tokens, logp = _tokens(found), await bodies.logp(found)
    return [
        rollout
        for group in batch.groups
        for rollout in _rollouts(group, batch.temperature, tokens, logp, divide_by_std=divide_by_std)
    ]


def _rollouts(
    group: BatchGroup,
    temperature: float,
    tokens: dict[str, tuple[int, ...]],
    logp: dict[str, tuple[float, ...]],
    *,
    divide_by_std: bool,
) -> Iterable[Rollout]:
    rewards = torch.tensor([[rollout.reward for rollout in group.rollouts]])
    prompt = Segment("prompt", tuple(wire.unpack_ids(group.prompt_ids).tolist()))
    shares = advantages(rewards, divide_by_std=divide_by_std)[0].tolist()
    for rollout, advantage in zip(group.rollouts, shares, strict=True):
        segments = (prompt, Segment("model", tokens[rollout.rollout]))
        yield Rollout(segments, advantage, temperature, logp.get(rollout.rollout), group.step)
