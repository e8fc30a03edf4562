"""Worker (and validator, when it evaluates): generate the rollouts of a lease and hand them in."""

from collections.abc import Callable, Sequence

from farflung.engine.base import Completion, Engine, Request
from farflung.net.session import Session
from farflung.protocol import wire
from farflung.protocol.errors import BadSignature
from farflung.protocol.identity import Signed, unseal
from farflung.protocol.messages import Lease, Submission, SubmittedRollout


async def open_lease(session: Session, signed: Signed) -> Lease:
    """Check that a lease is the coordinator's word and this node's. Raises BadSignature."""
    lease = unseal(signed, "lease", Lease, public=await session.keys("coordinator", signed))
    if lease.node != session.client.key.id or lease.run != session.run:
        raise BadSignature(f"lease {lease.lease} is for node {lease.node} of run {lease.run!r}")
    return lease


def requests_of(lease: Lease) -> list[tuple[str, Request]]:
    """(rollout id, request) of every sample of a lease."""
    return [
        (
            sample.rollout,
            Request(
                tuple(wire.unpack_ids(group.prompt_ids).tolist()),
                sample.seed,
                lease.temperature,
                lease.max_new_tokens,
            ),
        )
        for group in lease.groups
        for sample in group.samples
    ]


def generate(engine: Engine, lease: Lease, should_stop: Callable[[], bool]) -> list[tuple[str, Completion]]:
    """Every completed sample of a lease; fewer only if `should_stop` said yes or requests failed."""
    asked = requests_of(lease)
    found = engine.generate([request for _, request in asked], should_stop)
    return [(rollout, done) for (rollout, _), done in zip(asked, found, strict=True) if done is not None]


def submission_of(
    done: Sequence[tuple[str, Completion]], *, assigned: int, generate_s: float, possession: str = ""
) -> Submission:
    """The message that carries completed samples."""
    return Submission(
        rollouts=[SubmittedRollout(rollout=rollout, ids=wire.pack_ids(item.ids)) for rollout, item in done],
        possession=possession,
        partial=len(done) < assigned,
        logp=[wire.pack_floats(item.logp) for _, item in done],
        generate_s=generate_s,
    )


async def submit(session: Session, lease: Lease, submission: Submission) -> Signed:
    """Hand in a submission; gives the coordinator's sealed receipt."""
    return await session.client.post(session.path(f"leases/{lease.lease}/submission"), submission, Signed)
