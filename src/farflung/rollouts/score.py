"""Scorer: claim transcripts, have a child process judge each, report rewards. A child that fails reports a fault."""

import asyncio
from collections.abc import Sequence

import msgspec

from farflung.envs.child import ScorerChild
from farflung.net.session import Session
from farflung.protocol.errors import ScoreFault
from farflung.protocol.messages import Claim, Done, ScoreJob, ScoreJobs, ScoreResult, Scores


async def claim(session: Session, limit: int, wait_s: float) -> Sequence[ScoreJob]:
    """Up to `limit` transcripts; waits at the coordinator for the first."""
    jobs = await session.client.post(session.path("scores/claim"), Claim(limit=limit, wait_s=wait_s), ScoreJobs)
    session.latest = jobs.latest
    return jobs.jobs


async def score_all(children: Sequence[ScorerChild], jobs: Sequence[ScoreJob], timeout_s: float) -> list[ScoreResult]:
    """Score every job, spread over the children, in the order given."""
    queue = list(enumerate(jobs))
    results: dict[int, ScoreResult] = {}

    async def work(child: ScorerChild) -> None:
        while queue:
            number, job = queue.pop(0)
            results[number] = await _one(child, job, timeout_s)

    await asyncio.gather(*(work(child) for child in children))
    return [results[number] for number in range(len(jobs))]


async def _one(child: ScorerChild, job: ScoreJob, timeout_s: float) -> ScoreResult:
    try:
        score = await child.score(msgspec.json.decode(job.task), job.transcript, timeout_s)
    except ScoreFault as fault:
        return ScoreResult(rollout=job.rollout, error=str(fault)[:500])
    return ScoreResult(rollout=job.rollout, reward=score.reward, parts=score.parts, answer=score.answer[:500])


async def report(session: Session, results: list[ScoreResult]) -> None:
    """Hand rewards in."""
    await session.client.post(session.path("scores"), Scores(results=results), Done)
