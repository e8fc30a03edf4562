"""Coordinator: is a submission sane? Ids, lengths and ends: a pure function, no torch, no database."""

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from farflung.protocol import wire
from farflung.protocol.digest import digest_of
from farflung.protocol.errors import Rejected
from farflung.protocol.messages import Lease, Submission, SubmissionBody, SubmittedRollout
from farflung.protocol.stops import Stops


@dataclass(frozen=True)
class ValidSubmission:
    """A submission that passed sanity: its body as stored, and what the database needs of it."""

    lease: Lease
    body: bytes
    digest: str
    tokens: dict[str, int]
    """Rollout → number of tokens."""
    is_partial: bool
    generate_s: float
    logp: bytes
    """The node's own log-probabilities, a metric; empty when it sent none."""


def inspect(
    lease: Lease, node: str, submission: Submission, vocab: int, eos_ids: frozenset[int], stops: Stops | None = None
) -> ValidSubmission:
    """Sanity, a pure function. Raises Rejected with the first fault."""
    assigned = {sample.rollout for group in lease.groups for sample in group.samples}
    named = [rollout.rollout for rollout in submission.rollouts]
    if not set(named) <= assigned:
        raise Rejected(f"lease {lease.lease} does not assign rollouts {sorted(set(named) - assigned)}")
    if len(set(named)) != len(named):
        raise Rejected(f"{len(named)} rollouts came under {len(set(named))} ids; send each once")
    if not submission.partial and len(named) != len(assigned):
        raise Rejected(f"lease {lease.lease} assigns {len(assigned)} rollouts, {len(named)} came; send all of them")
    tokens = {r.rollout: _length(r, lease.max_new_tokens, vocab, eos_ids, stops) for r in submission.rollouts}
    body = msgspec.msgpack.encode(SubmissionBody(lease=lease.lease, node=node, rollouts=list(submission.rollouts)))
    return ValidSubmission(
        lease=lease,
        body=body,
        digest=digest_of(body),
        tokens=tokens,
        is_partial=submission.partial,
        generate_s=submission.generate_s,
        logp=_logp(submission, tokens),
    )


def _length(
    rollout: SubmittedRollout, max_new_tokens: int, vocab: int, eos_ids: frozenset[int], stops: Stops | None
) -> int:
    """Number of tokens of one rollout that ends as a rollout must."""
    ids = wire.unpack_ids(rollout.ids)
    if not 1 <= len(ids) <= max_new_tokens:
        raise Rejected(f"rollout {rollout.rollout} has {len(ids)} tokens; the lease allows 1 to {max_new_tokens}")
    if int(ids.max()) >= vocab:
        raise Rejected(f"rollout {rollout.rollout} has token {int(ids.max())}; the vocabulary has {vocab}")
    ends = {"an end token": _end(ids, eos_ids), "a stop string": stops.end(ids) if stops else 0}
    what, end = min(ends.items(), key=lambda one: one[1] or len(ids) + 1)
    if 0 < end < len(ids):
        raise Rejected(f"rollout {rollout.rollout} goes on after {what} at position {end - 1}")
    if not end and len(ids) < max_new_tokens:
        raise Rejected(
            f"rollout {rollout.rollout} stops after {len(ids)} of {max_new_tokens} tokens without an end token"
        )
    return len(ids)


def _end(ids: np.ndarray[Any, np.dtype[np.uint32]], eos_ids: frozenset[int]) -> int:
    """Number of tokens up to the first end token, or 0; for a handful of tokens `np.isin` takes five times as long."""
    ends = np.zeros(len(ids), dtype=np.bool_)
    for eos in eos_ids:
        ends |= ids == eos
    first = int(ends.argmax())
    return first + 1 if ends[first] else 0


def _logp(submission: Submission, tokens: dict[str, int]) -> bytes:
    if not submission.logp:
        return b""
    if len(submission.logp) != len(submission.rollouts):
        raise Rejected(f"{len(submission.logp)} lists of log-probabilities for {len(submission.rollouts)} rollouts")
    for rollout, values in zip(submission.rollouts, submission.logp, strict=True):
        if len(wire.unpack_floats(values)) != tokens[rollout.rollout]:
            raise Rejected(f"rollout {rollout.rollout} has another number of log-probabilities than tokens")
    return msgspec.msgpack.encode(submission.logp)
