"""Validator: claim audits, replay the drawn rollouts under the leased weights, sign the evidence."""

from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np

from farflung.engine.base import Engine, Replay, Request
from farflung.net.session import Session
from farflung.protocol import wire
from farflung.protocol.identity import Key, Signed, seal
from farflung.protocol.messages import (
    AuditJob,
    AuditJobs,
    AuditRollout,
    Claim,
    Done,
    Evidence,
    Explanation,
    RolloutEvidence,
)
from farflung.protocol.numerics import Dtype, Quantiser
from farflung.trust.diagnose import AS_LEASED
from farflung.trust.evidence import Seen, from_json, further, log_ratios, submission_log_ratios

TEMPERATURES = (0.9, 1.1)
"""Factors that are tried as explanations."""
Item = tuple[Request, list[int]]


async def claim(session: Session, limit: int, wait_s: float, linger_s: float) -> Sequence[AuditJob]:
    """Up to `limit` audits, all of one step; those of trusted nodes alone once they wait `linger_s`."""
    ask = Claim(limit=limit, wait_s=wait_s, linger_s=linger_s)
    jobs = await session.client.post(session.path("audits/claim"), ask, AuditJobs)
    session.latest = jobs.latest
    return jobs.jobs


def alike(jobs: Sequence[AuditJob]) -> list[list[AuditJob]]:
    """Audits that are to be replayed in the same way, together; those that came first lead."""
    found: dict[tuple[Sequence[Dtype], Quantiser], list[AuditJob]] = {}
    for job in jobs:
        found.setdefault((job.verify_in, quantiser_of(job)), []).append(job)
    return list(found.values())


def quantiser_of(job: AuditJob) -> Quantiser:
    """What the weights of an audit's node went through."""
    return from_json(job.profile).quantiser


def replay(
    engine: Engine, jobs: Sequence[AuditJob], run: str, arithmetic: Dtype, possession: Callable[[str, str], str]
) -> list[Evidence]:
    """Evidence for every audit, as much of it as it needs. The engine holds the audits' step, in this arithmetic.

    `possession` answers for it, given nonce and probe key in hex (`weights/loaded.py`).
    """
    seen: list[list[Replay]] = [[] for _ in jobs]
    while any(wanted := [more(job, found) for job, found in zip(jobs, seen, strict=True)]):
        parts = [
            items_of(job)[len(found) : len(found) + count] for job, found, count in zip(jobs, seen, wanted, strict=True)
        ]
        for found, part in zip(seen, _replay_each(engine, jobs, parts), strict=True):
            found += part
    return [
        Evidence(
            run=run,
            audit=job.audit,
            manifest=job.manifest,
            profile=from_json(job.profile).name,
            arithmetic=arithmetic,
            rollouts=list(_evidence(job.rollouts, found)),
            possession=possession(job.nonce, job.probe),
        )
        for job, found in zip(jobs, seen, strict=True)
    ]


def items_of(job: AuditJob, temperature: float = 1.0, others: Sequence[AuditRollout] = ()) -> list[Item]:
    """Items of an audit for an engine to replay, then those of `others`; at `temperature` times the leased one."""
    return [
        (
            Request(
                tuple(wire.unpack_ids(one.prompt_ids).tolist()),
                one.seed,
                job.temperature * temperature,
                job.max_new_tokens,
            ),
            wire.unpack_ids(one.ids).tolist(),
        )
        for one in (*job.rollouts, *others)
    ]


def more(job: AuditJob, found: Sequence[Replay]) -> int:
    """How many more rollouts to replay: none once these void the submission, for stopping is as valid as going on.

    While any cheat explains them better than honesty does it goes on one by one, so that a cheat costs no more tokens
    than it must; else by as many again as are done, so that the honest cost few passes.
    """
    left = len(job.rollouts) - len(found)
    if not job.cap:
        return left
    if not found:
        return 1
    profile = from_json(job.profile)
    try:
        ratios = [log_ratios(profile, Seen(one.gap, one.margin, one.pick, one.lead)) for one in found]
    except ValueError:  # this machine computes nonsense; the coordinator refuses it
        return left
    total = submission_log_ratios(ratios)
    return min(left, further(total, len(found), job.cap))


def _replay_each(engine: Engine, jobs: Sequence[AuditJob], of_jobs: Sequence[Sequence[Item]]) -> list[list[Replay]]:
    """One pass over all items, given back job by job.

    A suspect's come one by one and as plainly as can be: a second opinion in the arithmetic of the first would agree.
    """
    routine = [[] if job.is_suspect else items for job, items in zip(jobs, of_jobs, strict=True)]
    seen = engine.replay([item for items in routine for item in items])
    ends = np.cumsum([len(items) for items in routine])
    return [
        engine.replay(items, alone=True) if job.is_suspect and items else seen[end - len(part) : end]
        for job, items, part, end in zip(jobs, of_jobs, routine, ends, strict=True)
    ]


def _evidence(rollouts: Sequence[AuditRollout], found: Sequence[Replay]) -> Iterator[RolloutEvidence]:
    for one, seen in zip(rollouts, found, strict=False):
        fields = {name: wire.pack_floats(getattr(seen, name)) for name in Seen._fields}
        yield RolloutEvidence(rollout=one.rollout, **fields)


def explain(
    engine: Engine, evidence: Evidence, job: AuditJob, loads: Sequence[tuple[str, Callable[[], None]]]
) -> Evidence:
    """The same evidence with what the rollouts look like under other explanations, and as leased.

    They are tried on more of the submission than was drawn: one flip may have many causes. Other temperatures come
    with the weights in the engine, then each (name, load) of `loads`, which leaves its weights there.
    """
    found = [(AS_LEASED, engine.replay(items_of(job, others=job.others)))]
    for factor in TEMPERATURES:
        name = f"temperature {factor:g} times the leased one"
        found.append((name, engine.replay(items_of(job, factor, job.others))))
    for name, load in loads:
        load()
        found.append((name, engine.replay(items_of(job, others=job.others))))
    all_of_them = (*job.rollouts, *job.others)
    explanations = [Explanation(name=name, rollouts=list(_evidence(all_of_them, seen))) for name, seen in found]
    return msgspec.structs.replace(evidence, explanations=explanations)


async def testify(session: Session, key: Key, evidence: Evidence) -> None:
    """Sign evidence and hand it in."""
    signed: Signed = seal(key, "evidence", evidence)
    await session.client.post(session.path(f"audits/{evidence.audit}/evidence"), signed, Done)
