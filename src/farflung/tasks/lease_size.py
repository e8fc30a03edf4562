"""Coordinator: how many rollouts a lease has, by its node's measured speed.

A fast machine that is given as few as a slow one computes with a part of its batch, and waits. So it gets work for some
time; as its batch fills its speed rises, and the next lease is larger still. None is smaller than `lease.rollouts`:
where a few long rollouts take all of that time, a smaller batch would be slower, and the next one smaller again.
"""

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.protocol.messages import MAX_SAMPLES
from farflung.store.ledger import ISSUED
from farflung.store.run import RunContext
from farflung.store.tables import BALANCES, STEPS
from farflung.tasks.assign import AssignSettings

STEPS_LOOKED_AT = 5
OF_A_STEP = 0.25
"""A lease is to take this share of a step at most: groups complete early, and little is stale when it comes in."""


@dataclass(frozen=True, slots=True)
class LeaseSize:
    """What a run's leases are sized by."""

    least: int
    """Rollouts of a lease while its node's speed is unknown, and on probation."""
    seconds: float
    """How long a lease is to take; 0 where all have the same size."""
    mean_tokens: float
    """Of the run's rollouts so far; 0 for none."""

    def rollouts(self, tokens_per_s: float, *, is_new: bool) -> int:
        """Of a lease of a node that generates so fast; `is_new` on probation."""
        if is_new or not self.mean_tokens:
            return self.least
        return max(self.least, int(min(MAX_SAMPLES, tokens_per_s * self.seconds / self.mean_tokens)))


def lease_size(connection: Connection, run_ctx: RunContext, settings: AssignSettings) -> LeaseSize:
    """By the run's mean rollout and `lease.target_s`, or the time of its steps where they are short."""
    target_s = run_ctx.config.lease.target_s
    if not target_s:
        return LeaseSize(settings.lease_rollouts, 0.0, 0.0)
    issued = connection.execute(_ISSUED).first()
    mean_tokens = -issued.tokens / issued.entries if issued is not None and issued.entries else 0.0
    times = list(connection.execute(_COMMITTED, {"of": run_ctx.run}).scalars())
    step_s = (times[0] - times[-1]) / (len(times) - 1) if len(times) > 1 else target_s
    return LeaseSize(settings.lease_rollouts, min(target_s, OF_A_STEP * step_s), mean_tokens)


_ISSUED = sa.select(BALANCES.c.tokens, BALANCES.c.entries).where(BALANCES.c.account == ISSUED)
_COMMITTED = (
    sa.select(STEPS.c.committed_at)
    .where(STEPS.c.run == sa.bindparam("of"), STEPS.c.committed_at.is_not(None))
    .order_by(STEPS.c.step.desc())
    .limit(STEPS_LOOKED_AT)
)
