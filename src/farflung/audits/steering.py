"""Coordinator: add up the replays of all rollouts of a node, and draw the conclusion (`farflung.trust.watch`).

Audits write what they found beside each rollout, and so does the trainer's tripwire for the rest of a batch. When a
step's batch was looked at, each of its rollouts that was not yet counted is: once in its life, with its reward.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.audits import node_record, penalties
from farflung.audits.pronounce import pronounce
from farflung.protocol.messages import RolloutLook, Verdict
from farflung.store.run import RunContext, node_row
from farflung.store.tables import GROUPS, ROLLOUTS, SUBMISSIONS
from farflung.store.transitions import move
from farflung.trust.evidence import Profiles
from farflung.trust.record import Finding, watch_groups
from farflung.trust.watch import WatchedRollout


def note(connection: Connection, found: Iterable[RolloutLook | Finding]) -> None:
    """Write beside rollouts what their replay found; what was found first stays."""
    rows = [{"id": one.rollout, "x": one.flips, "y": one.liked, "a": one.allowed} for one in found]
    if rows:
        connection.execute(_NOTED, rows)


_NOTED = (
    ROLLOUTS.update()
    .where(ROLLOUTS.c.rollout == sa.bindparam("id"), ROLLOUTS.c.flips.is_(None))
    .values(flips=sa.bindparam("x"), liked=sa.bindparam("y"), allowed=sa.bindparam("a"))
)


def count_replays(
    connection: Connection,
    run_ctx: RunContext,
    profiles: Profiles,
    step: int,
    looked: Sequence[RolloutLook],
    now: float,
) -> int:
    """Count what the replays of an open step's batch found; gives how many nodes that lowers the status of."""
    of_batch = _of_batch(connection, run_ctx, step)
    note(connection, (one for one in looked if one.rollout in of_batch))
    found: dict[str, dict[str, list[WatchedRollout]]] = defaultdict(lambda: defaultdict(list))
    counted: list[str] = []
    for row in connection.execute(_UNWATCHED, {"of": run_ctx.run, "at": step}):
        likely = profiles.of(row.profile).liked
        found[row.node][row.group].append(WatchedRollout(row.flips, row.liked, row.allowed, row.reward, likely))
        counted.append(row.rollout)
    if counted:
        connection.execute(_WATCHED, [{"id": rollout} for rollout in counted])
    return sum(_watch(connection, run_ctx, node, list(groups.values()), step, now) for node, groups in found.items())


def _of_batch(connection: Connection, run_ctx: RunContext, step: int) -> set[str]:
    return set(connection.execute(_OF_BATCH, {"of": run_ctx.run, "at": step}).scalars())


_BATCH = sa.and_(GROUPS.c.run == sa.bindparam("of"), GROUPS.c.batch_step == sa.bindparam("at"))
_OF_BATCH = sa.select(ROLLOUTS.c.rollout).join(GROUPS, GROUPS.c.group == ROLLOUTS.c.group).where(_BATCH)
_UNWATCHED = (
    sa.select(ROLLOUTS.c.rollout, ROLLOUTS.c.node, ROLLOUTS.c.group, ROLLOUTS.c.flips, ROLLOUTS.c.liked)
    .add_columns(ROLLOUTS.c.allowed, ROLLOUTS.c.reward, SUBMISSIONS.c.profile)
    .join(GROUPS, GROUPS.c.group == ROLLOUTS.c.group)
    .join(SUBMISSIONS, SUBMISSIONS.c.submission == ROLLOUTS.c.submission)
    .where(_BATCH, ~ROLLOUTS.c.is_watched, ROLLOUTS.c.flips.is_not(None), ROLLOUTS.c.reward.is_not(None))
    .order_by(GROUPS.c.group, ROLLOUTS.c.sample)
)
_WATCHED = ROLLOUTS.update().where(ROLLOUTS.c.rollout == sa.bindparam("id")).values(is_watched=True)


def _watch(
    connection: Connection,
    run_ctx: RunContext,
    node: str,
    groups: Sequence[Sequence[WatchedRollout]],
    step: int,
    now: float,
) -> int:
    """Fold a node's groups into its record; 1 if something follows."""
    row = node_row(connection, node)
    before = node_record.read(row)
    if before.status == "ejected":
        return 0
    after, outcome = watch_groups(before, groups, node_record.settings(run_ctx))
    node_record.write(connection, node, after)
    if outcome.kind == "ok":
        return 0
    if after.status != before.status:
        move(connection, "node", [node], before.status, after.status, now, why=outcome.reason)
    mine, why = ROLLOUTS.c.node == node, "its node's flips are too many or serve it"
    if outcome.kind == "eject":
        batched = sa.select(ROLLOUTS.c.group).where(mine, ROLLOUTS.c.status == "batched").distinct()
        penalties.reopen(connection, list(connection.execute(batched).scalars()), now, why)
        penalties.eject(connection, run_ctx, node, now)
    else:
        penalties.hold(connection, run_ctx, mine, why, now, live=("received", "accepted", "batched"))
    verdict = Verdict(
        run=run_ctx.run,
        node=node,
        audit="none",
        outcome=outcome.kind,
        statistic=outcome.statistic,
        threshold=outcome.threshold,
        reason=outcome.reason[:500],
        decided_at=now,
    )
    was_trusted = before.status == "trusted"
    pronounce(connection, run_ctx, verdict, after.submissions, step=step, was_trusted=was_trusted)
    return 1
