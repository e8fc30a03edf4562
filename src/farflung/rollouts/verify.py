"""Validator: claim audits, replay the drawn rollouts under the leased weights, sign what was seen."""

from collections.abc import Sequence

import numpy as np

from farflung.engine.base import Engine, Replay, Request
from farflung.protocol import wire
from farflung.protocol.identity import Key, Signed, seal
from farflung.protocol.messages import (
    AuditJob,
    AuditJobs,
    AuditRollout,
    Claim,
    Done,
    Evidence,
    Manifest,
    RolloutEvidence,
)
from farflung.protocol.session import Session
from farflung.rollouts.submit import show_possession
from farflung.trust.fingerprint import distance


async def claim(session: Session, limit: int, wait_s: float) -> Sequence[AuditJob]:
    """Up to `limit` audits, all of one step."""
    jobs = await session.client.post(session.path("audits/claim"), Claim(limit=limit, wait_s=wait_s), AuditJobs)
    session.latest = jobs.latest
    return jobs.jobs


def replay(engine: Engine, manifest: Manifest, jobs: Sequence[AuditJob], run: str, profile: str) -> list[Evidence]:
    """Evidence for every audit, from one pass over all their rollouts. The engine holds the audits' step."""
    items = [
        (
            Request(
                tuple(wire.unpack_ids(rollout.prompt_ids).tolist()),
                rollout.seed,
                job.temperature,
                job.budget,
                job.fingerprint,
            ),
            wire.unpack_ids(rollout.ids).tolist(),
        )
        for job in jobs
        for rollout in job.rollouts
    ]
    seen = iter(engine.replay(items))
    evidence: list[Evidence] = []
    for job in jobs:
        found = [(rollout, next(seen)) for rollout in job.rollouts]
        rollouts = [
            RolloutEvidence(
                rollout=rollout.rollout,
                gap=wire.pack_floats(r.gap),
                margin=wire.pack_floats(r.margin),
                pick=wire.pack_floats(r.pick),
                distance=_distance(rollout, r),
            )
            for rollout, r in found
        ]
        shown = show_possession(engine, manifest, job.probe, job.nonce)
        evidence.append(
            Evidence(
                run=run,
                audit=job.audit,
                manifest=job.manifest,
                profile=profile,
                possession=shown,
                rollouts=rollouts,
            )
        )
    return evidence


def _distance(rollout: AuditRollout, seen: Replay) -> float | None:
    """None also where this machine's own activations are not finite: evidence without a distance accuses nobody."""
    if seen.sketch is None or not np.isfinite(seen.sketch).all():
        return None
    return distance(rollout.fingerprint, seen.sketch)


async def testify(session: Session, key: Key, evidence: Evidence) -> None:
    """Sign evidence and hand it in."""
    signed: Signed = seal(key, "evidence", evidence)
    await session.client.post(session.path(f"audits/{evidence.audit}/evidence"), signed, Done)
