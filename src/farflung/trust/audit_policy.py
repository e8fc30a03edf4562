"""Audit draws: a budget, not a habit. Pure functions of a record, settings and a secret key; nothing is drawn twice.

The unit is a whole rollout. The draw is HMAC(audit key of the step, lease ‖ digest ‖ index), so no retry, replica or
restart can draw again, no node can foresee it without the key, and a reader who learns the key later can check it.
"""

import math
from dataclasses import dataclass

from farflung.protocol.seeds import derive
from farflung.trust.record import NodeRecord, TrustSettings

__all__ = [
    "NodeRecord",
    "Poll",
    "TrustSettings",
    "affordable",
    "audit_probability",
    "draw",
    "is_breaker_due",
    "is_doubtful",
    "probability_caught",
]


def audit_probability(record: NodeRecord, settings: TrustSettings, afford: float = 1.0) -> float:
    """Without trust 1: every rollout is audited. With trust it falls with the record, and is never more than the
    budget affords (`afford`) nor less than `audit_least`, to which it goes while more than what the budget affords was
    replayed: work that no step trains on is looked at whatever it costs, and draws make up for it.

    It falls as 1 ÷ the clean record, down to a floor: the rule of BOINC's adaptive replication, where a host with n
    consecutive valid results has its next one replicated with probability 1/n (Anderson, BOINC: a platform for
    volunteer computing, 2020). One bad submission sets n to 0.
    """
    if record.status != "trusted":
        return 1.0
    if record.audited_trusted_tokens > afford * record.trusted_tokens:
        return settings.audit_least
    falling = max(settings.audit_floor, settings.audit_scale / max(record.clean_rollouts, 1))
    return min(1.0, max(min(falling, afford), settings.audit_least))


def affordable(budget: float, audit_s: float, generate_s: float) -> float:
    """The audit probability at which auditing costs `budget` of generation, from CPU-seconds per token of either.

    1 while one of them is unknown: then nothing is known to be too dear.
    """
    return min(1.0, budget * generate_s / audit_s) if audit_s > 0 and generate_s > 0 else 1.0


def draw(audit_key: bytes, lease_id: str, digest: bytes, size: int, limit: float) -> tuple[int, ...]:
    """The indices, rising, of the rollouts to audit in a submission of `size` with this digest: every draw below
    the audit probability `limit`.
    """
    return tuple(i for i in range(size) if _uniform(audit_key, lease_id, digest, i) < limit)


def _uniform(audit_key: bytes, lease_id: str, digest: bytes, index: int) -> float:
    """In [0, 1), from 53 bits: more would round up to 1, which even an audit probability of 1 does not draw."""
    value = derive(audit_key, "audit draw", lease_id, digest, index)
    return (int.from_bytes(value[:8], "big") >> 11) / 2**53


def probability_caught(n: int, cheat_fraction: float, audit_p: float, size: int, power: float) -> float:
    """P(at least one bad rollout is found within n submissions of `size` rollouts): 1 − (1 − f·p·power)^(n·size).

    For a trusted node that cheats on each rollout with probability f = `cheat_fraction`, is audited on each with
    probability p = `audit_p`, independently, and is found out by such an audit with probability `power`.
    """
    found = cheat_fraction * audit_p * power
    rollouts = n * size
    if found >= 1:
        return float(rollouts > 0)
    return -math.expm1(rollouts * math.log1p(-found))


@dataclass(frozen=True, slots=True)
class Poll:
    """How nodes with a good record fared at one step, weighed by verified tokens: work that passed a replay is the one
    thing that a swarm of keys has to pay for.
    """

    nodes: int
    """Nodes that failed."""
    failed: int = 0
    passed: int = 0
    """Of nodes that passed an audit of work which came since the first failed."""
    unknown: int = 0
    """Of nodes that are here and were not looked at since."""

    @property
    def failed_share(self) -> float:
        """Share of the work that nodes did which failed; all of it where there is none."""
        total = self.failed + self.passed + self.unknown
        return self.failed / total if total else 1.0

    @property
    def passed_share(self) -> float:
        """The same of those that passed."""
        total = self.failed + self.passed + self.unknown
        return self.passed / total if total else 0.0


def is_breaker_due(poll: Poll, share: float, least: int) -> bool:
    """Whether the verifier is suspect, not the nodes that failed: they did more than `share` of the work.

    A broken verifier fails everybody; cheats that turn together leave honest nodes that pass.
    """
    return poll.nodes >= least and poll.failed_share > share


def is_doubtful(poll: Poll, share: float, least: int) -> bool:
    """Whether several failed, and those that passed since did too little of the work to vouch for the verifier."""
    return poll.nodes >= least and poll.passed_share <= (1 - share) * (1 - 1e-9)
