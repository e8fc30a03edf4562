"""Distance of a fingerprint from the verifier's own: its bound, and the consequence beyond it. Pure; no torch.

With s the numbers that were sent and v the verifier's, the distance is √(1/K · Σ (s_k − v_k)²). It estimates how far
the two computations' activations lie apart, as a share of their norm, with a standard deviation of 1/√(2K) = 13 % of
itself (Johnson & Lindenstrauss 1984). Zeros are at a distance of 1, numbers that have nothing to do with v at √2.

A profile's bound is `SLACK` times the farthest of its calibration. Were honest rollouts exchangeable with those of the
calibration, one of n + 1 would be the farthest, so a bound without slack already fails fewer than 1 in n. But a policy
moves on after its calibration, so that is no bound in the sense of `farflung.trust.evidence`: a fingerprint that is too
far voids its submission and sends its node back to probation, and **never counts towards ejection**.
"""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from farflung.protocol.errors import Malformed
from farflung.protocol.fingerprint import Floats, clipped, unpack
from farflung.trust.record import Finding, NodeRecord, Outcome, demote

SLACK: Final = 1.5
FARTHEST: Final = 1000.0
"""The distance of what is no fingerprint at all; that of two real ones is at most 8."""


def distance(sent: bytes, seen_K: Floats) -> float:
    """Distance of a sent fingerprint from the verifier's numbers (K,): 0 if equal, `FARTHEST` if malformed.

    Raises ValueError if the verifier's own numbers are not finite: then it is the verifier that is broken.
    """
    if not np.isfinite(seen_K).all():
        raise ValueError("the verifier's own activations are not finite; its weights or its arithmetic are broken")
    try:
        return float(np.sqrt(np.mean(np.square(unpack(sent) - clipped(seen_K)))))
    except Malformed:
        return FARTHEST


def bound(distances: Sequence[float]) -> float:
    """The bound that honest distances of a calibration give; 0, which nothing passes, if there are none."""
    return SLACK * max(distances, default=0.0)


def is_far(found: float, most: float) -> bool:
    """Whether a distance fails a profile's bound. A profile without one, NaN and nothing at all fail."""
    return not (0 <= found <= most and most > 0)


def check(record: NodeRecord, outcome: Outcome, findings: Sequence[Finding], most: float) -> tuple[NodeRecord, Outcome]:
    """The outcome of an audited submission's tokens, with what its fingerprints add to it.

    A submission that its tokens let pass is void if one of them is too far, and its node goes back to probation.
    """
    far = [finding for finding in findings if finding.is_far]
    if outcome.kind not in ("ok", "release") or not far:
        return record, outcome
    worst = max(finding.distance for finding in far)
    reason = (
        f"{len(far)} of {len(findings)} fingerprints are not of the leased model on the leased prompt: the farthest is "
        f"{worst:.3g} away, {most:.3g} is the most for its profile; the submission is void"
    )
    return demote(record), Outcome("void", worst if math.isfinite(worst) else FARTHEST, most, reason)
