"""Coordinator: lease samples to nodes, take lapsed ones back. `assign.py` chooses; here the choice becomes rows.

A node has at most two open leases for each of its devices, each with a number of its own, and on probation one in
all. Asking again under a number, after a lost answer or a crash, gives the same one.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.protocol.errors import Forbidden, Refusal
from farflung.protocol.identity import Signed
from farflung.protocol.messages import LANES, Latest, LeaseRequest
from farflung.store import evaluations
from farflung.store.evaluations import HeldOutPart
from farflung.store.run import RunContext, ejected, new_id
from farflung.store.tables import GIVEN_UP, GROUPS, LEASES, NODES, ROLLOUTS, STEPS, TASKS
from farflung.store.transitions import end_leases
from farflung.tasks.allocator import Allocator
from farflung.tasks.assign import Asker, AssignSettings, Plan, Share, Wait
from farflung.tasks.candidates import Samples, groups_now, next_tasks, open_groups, open_samples, owners
from farflung.tasks.issue import Asking, write
from farflung.tasks.lease_size import LeaseSize, lease_size
from farflung.tasks.probation import Probation
from farflung.tasks.tiers import Quantised

ANY_CONTEXT = 1 << 40
LOOK_AHEAD = 4
"""Tasks looked up at first when groups are opened: few, for mostly the first will do."""


Answer = Signed | Wait | Refusal


@dataclass(frozen=True, slots=True)
class WorkRequest:
    """A registered node that asks for work."""

    node: Row[Any]
    wish: LeaseRequest

    @property
    def asking(self) -> Asking:
        """The node and its device."""
        return self.node.node, self.wish.device


def issue(connection: Connection, run_ctx: RunContext, asks: Sequence[WorkRequest], now: float) -> list[Answer]:
    """For each, in order: a sealed lease, why there is none now, or a refusal. A repeated ask gets the same answer."""
    asking = {ask.asking: ask for ask in reversed(asks)}
    nodes = sorted({ask.node.node for ask in asks})
    latest, facts = run_ctx.latest(connection), _NodeFacts(connection, run_ctx, nodes, now)
    known = {one: _without_work(ask, latest, facts) for one, ask in asking.items()}
    answers: dict[Asking, Answer] = {one: answer for one, answer in known.items() if answer is not None}
    left = [ask for one, ask in asking.items() if one not in answers]
    for ask in left:
        if ask.node.role == "validator":
            answers[ask.asking] = _issue_eval(connection, run_ctx, ask, latest.step, now)
    workers = [ask for ask in left if ask.node.role == "worker"]
    # in lockstep one lease may fill a step, so that the next is of another
    for part in ([ask] for ask in workers) if run_ctx.config.learn.lockstep else [workers] if workers else ():
        answers |= _issue_train(connection, run_ctx, part, latest.step, now)
    return [answers[ask.asking] for ask in asks]


class _NodeFacts:
    """The facts on the nodes of a set: the leases that they hold, and how often they gave one up."""

    def __init__(self, connection: Connection, run_ctx: RunContext, nodes: Sequence[str], now: float) -> None:
        self._most_s, self._now = run_ctx.config.deadline_s, now
        held = connection.execute(_HELD, {"ids": nodes, "of": run_ctx.run})
        self.held = {(row.node, row.device): row.document for row in held}
        self._busy, self._most = {node for node, _ in self.held}, run_ctx.config.lease.devices
        since = now - 2 * self._most_s
        self._suspect = run_ctx.suspect_profiles(connection)
        self._given_up = {row[0]: row[1:] for row in connection.execute(_ABANDONED, {"ids": nodes, "since": since})}

    def refuse(self, ask: WorkRequest) -> Answer | None:
        """The answer to a device that is to have no lease: one too many, of a node on probation that has one, or of
        one under a profile that has become suspect."""
        node, number = ask.asking
        if (why := self._suspect.get(ask.node.profile)) is not None:
            return Wait(f"no work under profile {ask.node.profile or 'of the run'!r}: {why}")
        devices = json.loads(ask.node.hardware or "{}").get("devices", 1)
        most = min(self._most, LANES * devices)
        if number >= most:
            return Forbidden(
                f"node {node} gets no lease under number {number}: with {devices} devices it may hold {most}; "
                f"join with --processes {min(self._most, devices)}"
            )
        if ask.node.status == "probation":
            if node in self._busy:
                return Wait(f"node {node} is on probation and has a lease for another device; one at a time until then")
            self._busy.add(node)
        return None

    def pause_s(self, node: str) -> float:
        """How long a node that hands leases back, whole or in part, or lets them lapse has to wait: 1 s, and twice that
        after each more.

        Otherwise one that refuses whatever it is given, because its disk is full, say, would be leased without end,
        and keys that do nothing would take all work.
        """
        count, last = self._given_up.get(node, (0, 0.0))
        return last + min(2.0 ** min(count - 1, 30), self._most_s) - self._now if count else 0.0


_HELD = sa.select(LEASES.c.node, LEASES.c.device, LEASES.c.document).where(
    LEASES.c.node.in_(sa.bindparam("ids", expanding=True)),
    LEASES.c.run == sa.bindparam("of"),
    LEASES.c.status == "open",
)

_ABANDONED = (
    sa.select(LEASES.c.node, sa.func.count(), sa.func.max(LEASES.c.opened_at))
    .where(
        LEASES.c.node.in_(sa.bindparam("ids", expanding=True)),
        sa.text(GIVEN_UP),
        LEASES.c.opened_at > sa.bindparam("since"),
    )
    .group_by(LEASES.c.node)
)


def _without_work(ask: WorkRequest, latest: Latest, facts: _NodeFacts) -> Answer | None:
    """The answer to a node for which no new lease is to be looked for."""
    node = ask.node
    if node.status == "ejected":
        return ejected(node.node)
    if (document := facts.held.get(ask.asking)) is not None:
        return msgspec.msgpack.decode(document, type=Signed)
    if latest.step < 0:
        return Wait("the trainer has not published the first weights yet")
    if node.role == "validator":
        return None
    if (pause_s := facts.pause_s(node.node)) > 0:
        return Wait(f"node {node.node} left samples of a lease to others; the next one comes in {pause_s:.0f} s")
    if latest.status != "running" or node.role != "worker" or node.status == "quarantined":
        return Wait(f"the run is {latest.status} and node {node.node} is a {node.status} {node.role}")
    return facts.refuse(ask)


# --- training --------------------------------------------------------------------------------------------------------


def _issue_train(
    connection: Connection, run_ctx: RunContext, asks: Sequence[WorkRequest], latest: int, now: float
) -> dict[Asking, Answer]:
    """Lease training work to nodes, one after the other; none under a policy that the next step takes back."""
    restored = connection.execute(
        _RESTORED, {"run": run_ctx.run, "since": latest - run_ctx.config.lease.max_lag}
    ).scalar()
    if restored == latest + 1:
        wait = Wait(f"step {restored} restores an earlier one; there is work again once it is committed")
        return {ask.asking: wait for ask in asks}
    if run_ctx.config.learn.lockstep:
        latest = _unfilled(connection, run_ctx, latest)
    settings = assign_settings(run_ctx, latest, is_last_taken=_is_last_taken(connection, run_ctx, latest))
    groups = open_groups(connection, run_ctx, latest - settings.max_staleness)
    had = owners(connection, [row.group for row in groups])
    allocator = Allocator(
        latest,
        open_samples(run_ctx, groups, had),
        groups_now(connection, run_ctx, latest),
        lambda step: next_tasks(connection, run_ctx, step, LOOK_AHEAD + len(asks)),
        partial(new_id, "g"),
        settings,
    )
    is_any_new = any(ask.node.status == "probation" for ask in asks)
    probation = Probation(connection, run_ctx, settings.groups_ahead, now) if is_any_new else None
    is_shared = run_ctx.quantised and run_ctx.config.learn.quantised_share < 1
    oldest = latest - settings.max_staleness
    quantised = Quantised(connection, run_ctx, settings.groups_ahead, oldest) if is_shared else None
    size = lease_size(connection, run_ctx, settings)
    found = {ask.asking: _plan(allocator, probation, quantised, size, ask, restored or 0, now) for ask in asks}
    plans = {one: plan for one, plan in found.items() if isinstance(plan, Plan)}
    waits = {one: wait for one, wait in found.items() if isinstance(wait, Wait)}
    return waits | write(connection, run_ctx, plans, "train", now, had.reopened)


_RESTORED = sa.select(sa.func.max(STEPS.c.step)).where(
    STEPS.c.run == sa.bindparam("run"), STEPS.c.step >= sa.bindparam("since"), STEPS.c.restores.is_not(None)
)


def _plan(
    allocator: Allocator,
    probation: Probation | None,
    quantised: Quantised | None,
    size: LeaseSize,
    ask: WorkRequest,
    oldest: int,
    now: float,
) -> Plan | Wait:
    node, wish = ask.node, ask.wish
    is_new = probation is not None and node.status == "probation"
    if is_new and (why := probation.why_not(node.node)):
        return Wait(why)
    loaded = wish.loaded_step if wish.loaded_step >= oldest else None
    slots = wish.slots if quantised is None else quantised.slots(node.profile, wish.slots)
    if quantised is not None and slots < min(wish.slots, allocator.settings.lease_minimum):
        return Wait(quantised.why_not)
    most = size.rollouts(node.tokens_per_s, is_new=node.status == "probation")
    asker = Asker(loaded, slots, wish.context or ANY_CONTEXT, node.node, most)
    plan = allocator.take(asker, now)
    if quantised is not None and isinstance(plan, Plan):
        quantised.take(node.profile, plan.rollouts)
    if is_new and isinstance(plan, Plan):
        probation.take(node.node, plan)
    return plan


def _is_last_taken(connection: Connection, run_ctx: RunContext, latest: int) -> bool:
    """Whether the run's last step has its batch already."""
    last = run_ctx.config.run.steps
    query = sa.select(STEPS.c.step).where(STEPS.c.run == run_ctx.run, STEPS.c.step == last)
    return latest + 1 >= last and connection.execute(query).first() is not None


def assign_settings(run_ctx: RunContext, latest: int, *, is_last_taken: bool = False) -> AssignSettings:
    """The pure assignment's view of the configuration. Once the last step has its batch no step wants further groups.

    In lockstep new groups are of one policy, as many as some step takes, and whatever is missing of an older one is
    leased again for as long as its step waits.
    """
    config = run_ctx.config
    is_lockstep = config.learn.lockstep
    return AssignSettings(
        max_staleness=config.learn.max_staleness + is_lockstep,
        max_lag=0 if is_lockstep else config.lease.max_lag,
        lease_rollouts=config.lease.rollouts,
        group_size=config.generate.samples,
        groups_ahead=0 if is_last_taken and not is_lockstep else config.wanted_groups(latest),
    )


def _unfilled(connection: Connection, run_ctx: RunContext, latest: int) -> int:
    """In lockstep, the oldest policy that a step to come trains on and that has groups to open still, else the latest.

    The next step may be committed before all groups of this one are opened: they are opened none the less.
    """
    config = run_ctx.config
    policies = range(max(0, latest - config.learn.max_staleness), latest + 1)
    return next((p for p in policies if groups_now(connection, run_ctx, p) < config.wanted_groups(p)), latest)


# --- evaluation ------------------------------------------------------------------------------------------------------


def _issue_eval(
    connection: Connection, run_ctx: RunContext, ask: WorkRequest, latest: int, now: float
) -> Signed | Wait:
    size = min(ask.wish.slots, run_ctx.config.eval.rollouts)
    for step, part in evaluations.left(connection, run_ctx.config, latest):
        shares, reopened = _eval_shares(connection, run_ctx, step, part, max(1, size // part.samples))
        if shares:
            old, new = (tuple(s for s in shares if bool(s.group) is is_open) for is_open in (True, False))
            plan = Plan(step, old, tuple(replace(share, group=new_id("g")) for share in new))
            return write(connection, run_ctx, {ask.asking: plan}, part.purpose, now, reopened)[ask.asking]
    return Wait("nothing to evaluate")


def _eval_shares(
    connection: Connection, run_ctx: RunContext, step: int, part: HeldOutPart, most: int
) -> tuple[list[Share], Samples]:
    """The samples that no node has of up to `most` held-out tasks at this step, and those that are open again."""
    this = sa.and_(GROUPS.c.task == TASKS.c.task, GROUPS.c.step == step, GROUPS.c.purpose == part.purpose)
    rows = connection.execute(
        sa.select(GROUPS.c.group, GROUPS.c.samples, TASKS.c.task)
        .select_from(TASKS.outerjoin(GROUPS, this))
        .where(
            TASKS.c.run == run_ctx.run,
            TASKS.c.split == "eval",
            TASKS.c.position < part.tasks,
            sa.or_(GROUPS.c.group.is_(None), sa.and_(GROUPS.c.status == "open", GROUPS.c.free > 0)),
        )
        .order_by(TASKS.c.position)
        .limit(most)
    ).all()
    had = owners(connection, [row.group for row in rows if row.group])
    free = [(row, set(range(row.samples or part.samples)) - had.owned.get(row.group, set())) for row in rows]
    return [Share(row.group, row.task, tuple(sorted(samples))) for row, samples in free if samples], had.reopened


# --- taking back -----------------------------------------------------------------------------------------------------


def expire(connection: Connection, run_ctx: RunContext, now: float, listening_since: float) -> int:
    """Take back leases that are past due or whose node fell silent while this process listened; gives how many."""
    lost_since = now - run_ctx.config.lease.lost_s
    silent_since = lost_since if listening_since < lost_since else 0.0
    rows = connection.execute(_OVER, {"run": run_ctx.run, "now": now, "silent_since": silent_since}).all()
    for row in rows:
        why = "deadline passed" if row.expires_at < now else "node fell silent"
        end_leases(connection, [row.lease], "expired", now, why=why, node=row.node)
    return len(rows)


_OVER = (  # asked four times a second, so built once
    sa.select(LEASES.c.lease, LEASES.c.node, LEASES.c.expires_at)
    .join(NODES, NODES.c.node == LEASES.c.node)
    .where(LEASES.c.run == sa.bindparam("run"), LEASES.c.status == "open")
    .where(sa.or_(LEASES.c.expires_at < sa.bindparam("now"), NODES.c.seen_at < sa.bindparam("silent_since")))
)


def stranded(connection: Connection, run_ctx: RunContext, now: float) -> list[str]:
    """Open groups with a sample that every node at work has handed in before, so that none of them may do it again.

    Without an end such groups would take up room for new ones, and in lockstep a step would wait for them for ever.
    """
    had: dict[tuple[str, int], set[str]] = defaultdict(set)
    oldest = run_ctx.latest(connection).step - assign_settings(run_ctx, 0).max_staleness
    for group, sample, node in connection.execute(_HANDED_IN, {"run": run_ctx.run, "oldest": oldest}):
        had[group, sample].add(node)
    if not had:
        return []
    workers = set(connection.execute(_AT_WORK, {"since": now - run_ctx.config.lease.lost_s}).scalars())
    spent = [place for place, nodes in had.items() if workers and workers <= nodes]
    owned = owners(connection, sorted({group for group, _ in spent})).owned
    return sorted({group for group, sample in spent if sample not in owned[group]})


_HANDED_IN = (
    sa.select(ROLLOUTS.c.group, ROLLOUTS.c.sample, ROLLOUTS.c.node)
    .join(GROUPS, GROUPS.c.group == ROLLOUTS.c.group)
    .where(
        GROUPS.c.run == sa.bindparam("run"),
        GROUPS.c.purpose == "train",
        GROUPS.c.status == sa.literal_column("'open'"),
        GROUPS.c.free > sa.literal_column("0"),
        GROUPS.c.step >= sa.bindparam("oldest"),
        ROLLOUTS.c.status.in_(("rejected", "void")),
    )
)
_AT_WORK = sa.select(NODES.c.node).where(
    NODES.c.role == "worker", NODES.c.status.in_(("probation", "trusted")), NODES.c.seen_at > sa.bindparam("since")
)


def lost_leases(connection: Connection, nodes: Collection[str], since: float) -> dict[str, list[str]]:
    """Leases that were lately taken from these nodes."""
    lost: dict[str, list[str]] = defaultdict(list)
    for node, lease in connection.execute(_LOST, {"ids": list(nodes), "since": since}):
        lost[node].append(lease)
    return lost


_LOST = sa.select(LEASES.c.node, LEASES.c.lease).where(
    LEASES.c.node.in_(sa.bindparam("ids", expanding=True)),
    LEASES.c.status.in_(("expired", "void")),
    LEASES.c.opened_at > sa.bindparam("since"),
)
