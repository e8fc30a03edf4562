"""Coordinator: how much of the work nodes with quantised weights may have, all of them together."""

from collections.abc import Collection

import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.store.run import RunContext
from farflung.store.tables import GROUPS, LIVE_ROLLOUT, NODES, ROLLOUTS


class Quantised:
    """Samples left for them: their share (`learn.quantised_share`) of what may be under way at recent steps."""

    def __init__(self, connection: Connection, run_ctx: RunContext, groups_ahead: int, oldest: int) -> None:
        """`oldest` is the first step whose groups count."""
        self._names: Collection[str] = run_ctx.quantised
        self._share = run_ctx.config.learn.quantised_share
        most = int(self._share * groups_ahead * run_ctx.config.generate.samples)
        found = {"of": run_ctx.run, "since": oldest, "profiles": sorted(self._names)}
        self._left = max(0, most - connection.execute(_THEIRS, found).scalar_one())

    def slots(self, profile: str, slots: int) -> int:
        """How many of these slots a node with this profile may have filled."""
        return min(slots, self._left) if profile in self._names else slots

    def take(self, profile: str, rollouts: int) -> None:
        """So many are leased to a node with this profile."""
        self._left -= rollouts if profile in self._names else 0

    @property
    def why_not(self) -> str:
        """Why a node of theirs has to wait."""
        return f"nodes with quantised weights have their share of the work ({self._share:.0%}, learn.quantised_share)"


_THEIRS = (
    sa.select(sa.func.count())
    .select_from(ROLLOUTS)
    .join(NODES, NODES.c.node == ROLLOUTS.c.node)
    .join(GROUPS, GROUPS.c.group == ROLLOUTS.c.group)
    .where(ROLLOUTS.c.run == sa.bindparam("of"), ROLLOUTS.c.status.in_(LIVE_ROLLOUT))
    .where(GROUPS.c.step >= sa.bindparam("since"), GROUPS.c.purpose == "train")
    .where(NODES.c.profile.in_(sa.bindparam("profiles", expanding=True)))
)
