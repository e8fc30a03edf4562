"""Trainer: claim a step's batch, fetch its tokens, turn groups into rollouts with advantages.

Rewards come from the coordinator, tokens by digest; a worker's log-probabilities ride along as a metric.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
import torch

from farflung.learner.loss import advantages
from farflung.learner.pack import Rollout, Segment
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
    Trips,
)
from farflung.protocol.session import Session

AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Suspect:
    """One rollout that the tripwire looks at."""

    rollout: str
    manifest: str
    submission: str
    prompt_ids: tuple[int, ...]
    seed: int
    ids: tuple[int, ...]
    is_audited: bool
    """Whether a validator has replayed it, so that it is no suspect any more."""
    profile: str
    """Numerics profile of its node."""


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


async def suspects(session: Session, batch: Batch, *, is_all: bool) -> list[Suspect]:
    """Every rollout of a batch that no audit has replayed in full, or simply every one, as the tripwire needs it."""
    groups = [*batch.groups, *batch.spare]
    every = [(group, rollout) for group in groups for rollout in group.rollouts if is_all or not rollout.is_audited]
    tokens, _ = await _bodies(session, {rollout.submission for _, rollout in every})
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


async def fetch(session: Session, batch: Batch, *, divide_by_std: bool) -> list[Rollout]:
    """Every rollout of a batch, in its order, with tokens, advantage and claimed log-probabilities."""
    digests = {rollout.submission for group in batch.groups for rollout in group.rollouts}
    tokens, logp = await _bodies(session, digests)
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


async def _bodies(
    session: Session, digests: Iterable[str]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[float, ...]]]:
    tokens: dict[str, tuple[int, ...]] = {}
    logp: dict[str, tuple[float, ...]] = {}
    limit = asyncio.Semaphore(AT_ONCE)

    async def one(digest: str) -> None:
        async with limit:
            path = session.path(f"submissions/{digest}")
            body = await session.client.download(path, signed=True)
            claimed = await session.client.download(path + "/logp", signed=True)
        if digest_of(body) != digest:
            raise WeightsError(f"submission {digest[:12]} does not hash to its name; the blob store is damaged")
        found = msgspec.msgpack.decode(body, type=SubmissionBody).rollouts
        tokens.update({rollout.rollout: tuple(wire.unpack_ids(rollout.ids).tolist()) for rollout in found})
        if claimed:
            values = msgspec.msgpack.decode(claimed, type=list[bytes])
            logp.update({r.rollout: tuple(wire.unpack_floats(v).tolist()) for r, v in zip(found, values, strict=True)})

    await asyncio.gather(*(one(digest) for digest in sorted(digests)))
    return tokens, logp
