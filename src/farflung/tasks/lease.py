"""Coordinator: lease samples to nodes, take lapsed ones back. `assign.py` chooses; here the choice becomes rows.

A node has at most one open lease. Asking again, after a lost answer or a crash, gives the same one.
"""

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.protocol import seeds
from farflung.protocol.errors import Ejected
from farflung.protocol.identity import Signed, seal
from farflung.protocol.messages import Lease, LeaseGroup, LeaseRequest, Sample
from farflung.protocol.states import REOPENING
from farflung.store import heldout
from farflung.store.book import Book, new_id
from farflung.store.db import after_commit, end_leases, record
from farflung.store.heldout import HELD_OUT, Part
from farflung.store.tables import AUDITS, GROUPS, LEASES, NODES, ROLLOUTS, STEPS, TASKS
from farflung.tasks.assign import Asker, AssignSettings, NextTask, OpenSamples, Plan, Share, Wait, assign, task_order

KIND = "lease"
ANY_CONTEXT = 1 << 40
ORDERS_KEPT = 8
LOOK_AHEAD, MOST_LOOK_AHEAD = 4, 256
"""Tasks looked up at once when groups are opened: few at first, for mostly the first will do."""


def issue(connection: Connection, book: Book, node: Row[Any], ask: LeaseRequest, now: float) -> Signed | Wait:
    """A sealed lease for this node, or why there is none now. Raises Ejected."""
    if node.status == "ejected":
        raise Ejected(f"node {node.node} was ejected for failing verification; GET /v1/story/{node.node} says why")
    if (held := _held(connection, book.run, node.node)) is not None:
        return held
    latest = book.latest(connection)
    if latest.step < 0:
        return Wait("the trainer has not published the first weights yet")
    if node.role == "validator":
        return _issue_eval(connection, book, node, ask, latest.step, now)
    if (pause_s := _pause_s(connection, book, node.node, now)) > 0:
        return Wait(f"node {node.node} handed a lease back; the next one comes in {pause_s:.0f} s")
    if latest.status != "running" or node.role != "worker" or node.status == "quarantined":
        return Wait(f"the run is {latest.status} and node {node.node} is a {node.status} {node.role}")
    if node.status == "probation" and (why := _unproven(connection, book, node.node)):
        return Wait(why)
    return _issue_train(connection, book, node, ask, latest.step, now)


def _unproven(connection: Connection, book: Book, node: str) -> str:
    """Why a node on probation has to wait, or nothing: until its own last work is replayed, and for a slot.

    The slots are few and shared by all new keys, so ten thousand of them slow only each other. Whoever holds a lease or
    waits for a replay has one.
    """
    query = (
        sa.select(AUDITS.c.node, sa.func.count())
        .join(NODES, NODES.c.node == AUDITS.c.node)
        .where(AUDITS.c.run == book.run, AUDITS.c.status.in_(("open", "claimed")), NODES.c.status == "probation")
        .group_by(AUDITS.c.node)
    )
    waiting: dict[str, int] = {row[0]: row[1] for row in connection.execute(query)}
    if waiting.get(node, 0) >= book.config.trust.probation_waiting:
        return f"node {node} is on probation and what it sent waits for its replay"
    slots = book.config.trust.probation_slots
    leased = (
        sa.select(LEASES.c.node)
        .join(NODES, NODES.c.node == LEASES.c.node)
        .where(LEASES.c.run == book.run, LEASES.c.status == "open", NODES.c.status == "probation")
    )
    taken = {*waiting, *connection.execute(leased.where(NODES.c.role == "worker")).scalars()}
    if node not in taken and len(taken) >= slots:
        return f"{len(taken)} nodes on probation work or wait for their replays; {slots} may at a time"
    return ""


_HELD = sa.select(LEASES.c.document).where(
    LEASES.c.node == sa.bindparam("id"), LEASES.c.run == sa.bindparam("of"), LEASES.c.status == "open"
)


def _held(connection: Connection, run: str, node: str) -> Signed | None:
    document = connection.execute(_HELD, {"id": node, "of": run}).scalar()
    return None if document is None else msgspec.msgpack.decode(document, type=Signed)


_ABANDONED = sa.select(sa.func.count(), sa.func.max(LEASES.c.opened_at)).where(
    LEASES.c.node == sa.bindparam("id"),
    LEASES.c.status.in_(("returned", "expired")),
    LEASES.c.opened_at > sa.bindparam("since"),
)


def _pause_s(connection: Connection, book: Book, node: str, now: float) -> float:
    """How long a node that hands leases back or lets them lapse has to wait: 1 s, and twice that after each more.

    Otherwise one that refuses whatever it is given, because its disk is full, say, would be leased without end, and
    keys that do nothing would take all work.
    """
    most_s = book.config.lease.lease_s
    count, last = connection.execute(_ABANDONED, {"id": node, "since": now - 2 * most_s}).one()
    return last + min(2.0 ** min(count - 1, 30), most_s) - now if count else 0.0


# --- training --------------------------------------------------------------------------------------------------------


def _issue_train(
    connection: Connection, book: Book, node: Row[Any], ask: LeaseRequest, latest: int, now: float
) -> Signed | Wait:
    if book.config.learn.lockstep:
        latest = _unfilled(connection, book, latest)
    settings = assign_settings(book, latest)
    groups = _open_groups(connection, book, latest - settings.max_staleness)
    asker = Asker(ask.loaded_step if ask.loaded_step >= 0 else None, ask.slots, ask.context or ANY_CONTEXT)
    plan = assign(
        now,
        latest,
        asker,
        _open_samples(connection, book, groups),
        _groups_now(connection, book, latest),
        lambda step: _next_tasks(connection, book, step),
        settings,
    )
    if isinstance(plan, Wait):
        return plan
    return _write(connection, book, node.node, plan, "train", now)


def assign_settings(book: Book, latest: int) -> AssignSettings:
    """The pure assignment's view of the configuration.

    In lockstep new groups are of one policy, as many as some step takes, and whatever is missing of an older one is
    leased again for as long as its step waits.
    """
    config = book.config
    is_lockstep = config.learn.lockstep
    ahead = int(config.learn.groups * max(config.lease.ahead, config.learn.oversample))
    return AssignSettings(
        max_staleness=config.learn.max_staleness + is_lockstep,
        max_lag=0 if is_lockstep else config.lease.max_lag,
        lease_rollouts=config.lease.rollouts,
        group_size=config.generate.samples,
        groups_ahead=config.lockstep_groups(latest) if is_lockstep else ahead,
    )


def _unfilled(connection: Connection, book: Book, latest: int) -> int:
    """In lockstep, the oldest policy that a step to come trains on and that has groups to open still, else the latest.

    The next step may be committed before all groups of this one are opened: they are opened none the less.
    """
    of_run = sa.and_(GROUPS.c.run == book.run, GROUPS.c.purpose == "train")
    query = sa.select(GROUPS.c.step, sa.func.count()).where(of_run).group_by(GROUPS.c.step)
    opened: dict[int, int] = {row[0]: row[1] for row in connection.execute(query)}
    policies = range(max(0, latest - book.config.learn.max_staleness), latest + 1)
    return next((p for p in policies if opened.get(p, 0) < book.config.lockstep_groups(p)), latest)


_OPEN_GROUPS = (
    sa.select(GROUPS, sa.func.length(TASKS.c.prompt_ids).label("prompt_bytes"))
    .join(TASKS, TASKS.c.task == GROUPS.c.task)
    .where(
        GROUPS.c.run == sa.bindparam("of"),
        GROUPS.c.purpose == "train",
        GROUPS.c.status == sa.literal_column("'open'"),  # not a parameter, or SQLite does not see that
        GROUPS.c.free > sa.literal_column("0"),  # the index `group_free` will do
        GROUPS.c.step >= sa.bindparam("oldest"),
    )
)


def _open_groups(connection: Connection, book: Book, oldest: int) -> Sequence[Row[Any]]:
    return connection.execute(_OPEN_GROUPS, {"of": book.run, "oldest": oldest}).all()


def _open_samples(connection: Connection, book: Book, groups: Sequence[Row[Any]]) -> Iterator[OpenSamples]:
    """Samples of these groups that nobody has, those that somebody had before apart from the rest."""
    if not groups:
        return
    owned, reopened = _owners(connection, [row.group for row in groups])
    for row in groups:
        free = set(range(row.samples)) - owned[row.group]
        needed = row.prompt_bytes // 4 + book.config.generate.budget
        for samples, at in ((free - reopened[row.group], None), (free & reopened[row.group], row.opened_at)):
            if samples:
                yield OpenSamples(row.group, row.task, row.step, tuple(sorted(samples)), needed, at)


_OWNERS = sa.select(ROLLOUTS.c.group, ROLLOUTS.c.sample, ROLLOUTS.c.status).where(
    ROLLOUTS.c.group.in_(sa.bindparam("groups", expanding=True))
)


def _owners(connection: Connection, groups: Sequence[str]) -> tuple[dict[str, set[int]], dict[str, set[int]]]:
    owned: dict[str, set[int]] = defaultdict(set)
    reopened: dict[str, set[int]] = defaultdict(set)
    for group, sample, status in connection.execute(_OWNERS, {"groups": groups}):
        (reopened if status in REOPENING else owned)[group].add(sample)
    return owned, reopened


_GROUPS_NOW = sa.select(
    sa.select(sa.func.count())
    .select_from(GROUPS)
    .where(GROUPS.c.run == sa.bindparam("of"), GROUPS.c.purpose == "train", GROUPS.c.status == "complete")
    .scalar_subquery()
    + sa.select(sa.func.coalesce(sa.func.sum(STEPS.c.open_groups), 0))
    .where(STEPS.c.run == sa.bindparam("of"), STEPS.c.step >= sa.bindparam("oldest"))
    .scalar_subquery()
)


def _groups_now(connection: Connection, book: Book, latest: int) -> int:
    """Groups in progress or waiting for the trainer; in lockstep, all that were ever opened at the latest policy.

    Open ones too old to be leased do not count: enough of them, each short of a sample, would end all leasing.
    """
    if book.config.learn.lockstep:
        of_latest = sa.and_(GROUPS.c.run == book.run, GROUPS.c.purpose == "train", GROUPS.c.step == latest)
        return connection.execute(sa.select(sa.func.count()).where(of_latest)).scalar_one()
    oldest = latest - max(1, book.config.learn.max_staleness) + 1
    return int(connection.execute(_GROUPS_NOW, {"of": book.run, "oldest": oldest}).scalar_one())


def _next_tasks(connection: Connection, book: Book, step: int) -> Iterator[NextTask]:
    """Tasks not opened at this step yet, in the order that its secret draws."""
    order = _order(book, step)
    start, size = order.begin, LOOK_AHEAD
    while positions := order.from_(start, size):
        opened = _opened(connection, book, step, [book.tasks[position][0] for position in positions])
        found = [book.tasks[position] for position in positions]
        left = [number for number, (task, _) in enumerate(found) if task not in opened]
        if start == order.begin:
            after_commit(connection, partial(order.skip_to, start + min(left, default=len(found))))
        for number in left:
            task, prompt_tokens = found[number]
            yield NextTask(task, prompt_tokens + book.config.generate.budget)
        start, size = start + size, MOST_LOOK_AHEAD


_OPENED = sa.select(GROUPS.c.task).where(
    GROUPS.c.task.in_(sa.bindparam("tasks", expanding=True)),
    GROUPS.c.run == sa.bindparam("of"),
    GROUPS.c.step == sa.bindparam("at"),
    GROUPS.c.purpose == "train",
)


def _opened(connection: Connection, book: Book, step: int, tasks: Sequence[str]) -> set[str]:
    """Which of these have a group at this step."""
    return set(connection.execute(_OPENED, {"tasks": tasks, "of": book.run, "at": step}).scalars())


class _Order:
    """The order of one step's tasks, drawn as far as somebody looked. All before `begin` are opened, and stay so."""

    def __init__(self, source: Iterator[int]) -> None:
        self._source, self._seen, self.begin = source, list[int](), 0

    def from_(self, start: int, size: int) -> list[int]:
        """Up to `size` tasks from place `start` on."""
        self._seen += itertools.islice(self._source, max(0, start + size - len(self._seen)))
        return self._seen[start : start + size]

    def skip_to(self, begin: int) -> None:
        """Never look at what is before this place again."""
        self.begin = max(self.begin, begin)


def _order(book: Book, step: int) -> _Order:
    """Kept with the book, for two databases may have opened different tasks of one order."""
    if step not in book.orders:
        for old in sorted(book.orders)[: 1 - ORDERS_KEPT]:
            del book.orders[old]
        book.orders[step] = _Order(task_order(book.step_secret(step), step, len(book.tasks)))
    return book.orders[step]


# --- evaluation ------------------------------------------------------------------------------------------------------


def _issue_eval(
    connection: Connection, book: Book, node: Row[Any], ask: LeaseRequest, latest: int, now: float
) -> Signed | Wait:
    size = min(ask.slots, book.config.eval.rollouts)
    for step, part in heldout.left(connection, book.config, latest):
        shares = _eval_shares(connection, book, step, part, max(1, size // part.samples))
        if shares:
            plan = Plan(step, tuple(s for s in shares if s.group), tuple(s for s in shares if not s.group))
            return _write(connection, book, node.node, plan, part.purpose, now)
    return Wait("nothing to evaluate")


def _eval_shares(connection: Connection, book: Book, step: int, part: Part, most: int) -> list[Share]:
    """The samples that nobody has of up to `most` held-out tasks at this step."""
    this = sa.and_(GROUPS.c.task == TASKS.c.task, GROUPS.c.step == step, GROUPS.c.purpose == part.purpose)
    rows = connection.execute(
        sa.select(GROUPS.c.group, GROUPS.c.samples, TASKS.c.task)
        .select_from(TASKS.outerjoin(GROUPS, this))
        .where(
            TASKS.c.run == book.run,
            TASKS.c.split == "eval",
            TASKS.c.position < part.tasks,
            sa.or_(GROUPS.c.group.is_(None), sa.and_(GROUPS.c.status == "open", GROUPS.c.free > 0)),
        )
        .order_by(TASKS.c.position)
        .limit(most)
    ).all()
    owned, _ = _owners(connection, [row.group for row in rows if row.group])
    free = [(row, set(range(row.samples or part.samples)) - owned.get(row.group, set())) for row in rows]
    return [Share(row.group, row.task, tuple(sorted(samples))) for row, samples in free if samples]


# --- rows ------------------------------------------------------------------------------------------------------------


def _write(connection: Connection, book: Book, node: str, plan: Plan, purpose: str, now: float) -> Signed:
    """Open the groups, the lease and its rollouts, and seal the document."""
    shares = [*plan.continued, *_open(connection, book, plan, purpose, now)]
    lease = new_id("l")
    rows = [
        {"rollout": new_id("r"), "group": share.group, "sample": sample} for share in shares for sample in share.samples
    ]
    told = "eval" if purpose in HELD_OUT else purpose
    heat = next((part.temperature for part in heldout.parts(book.config) if part.purpose == purpose), None)
    document = _document(connection, book, lease, node, plan.step, told, heat, shares, rows, now)
    signed = seal(book.key, KIND, document)
    opened = {"lease": lease, "run": book.run, "node": node, "step": plan.step, "purpose": told, "status": "open"}
    opened |= {"opened_at": now, "expires_at": document.expires_at, "document": msgspec.msgpack.encode(signed)}
    connection.execute(LEASES.insert(), opened)
    before = [share.group for share in plan.continued if share.group]
    _, reopened = _owners(connection, before) if before else ({}, dict[str, set[int]]())
    for row in rows:
        row |= {"run": book.run, "lease": lease, "node": node, "status": "leased"}
        row["is_reissue"] = row["sample"] in reopened.get(row["group"], ())
    connection.execute(ROLLOUTS.insert(), rows)
    _take(connection, plan.continued)
    record(connection, "lease", [lease], "", "open", now, node=node, step=plan.step, rollouts=len(rows))
    record(connection, "rollout", [row["rollout"] for row in rows], "", "leased", now, lease=lease, node=node)
    return signed


def _take(connection: Connection, shares: Sequence[Share]) -> None:
    """These samples of groups that were open before are free no more."""
    rows = [{"of": share.group, "fewer": len(share.samples)} for share in shares if share.group]
    if rows:
        fewer = GROUPS.c.free - sa.bindparam("fewer")
        connection.execute(GROUPS.update().where(GROUPS.c.group == sa.bindparam("of")).values(free=fewer), rows)


_MORE_OPEN = (
    STEPS.update()
    .where(STEPS.c.run == sa.bindparam("of"), STEPS.c.step == sa.bindparam("at"))
    .values(open_groups=STEPS.c.open_groups + sa.bindparam("more"))
)


def _open(connection: Connection, book: Book, plan: Plan, purpose: str, now: float) -> list[Share]:
    if not plan.opened:
        return []
    shares = [Share(new_id("g"), share.task, share.samples) for share in plan.opened]
    common = {"run": book.run, "step": plan.step, "purpose": purpose, "status": "open", "opened_at": now}
    held_out = {part.purpose: part.samples for part in heldout.parts(book.config)}
    samples = held_out.get(purpose, book.config.generate.samples)
    common |= {"samples": samples}
    connection.execute(
        GROUPS.insert(),
        [common | {"group": s.group, "task": s.task, "free": samples - len(s.samples)} for s in shares],
    )
    if purpose == "train":
        connection.execute(_MORE_OPEN, {"of": book.run, "at": plan.step, "more": len(shares)})
    record(connection, "group", [str(share.group) for share in shares], "", "open", now, step=plan.step)
    return shares


def _document(
    connection: Connection,
    book: Book,
    lease: str,
    node: str,
    step: int,
    purpose: Any,
    temperature: float | None,
    shares: Sequence[Share],
    rows: Sequence[dict[str, Any]],
    now: float,
) -> Lease:
    config = book.config
    return Lease(
        lease=lease,
        run=book.run,
        node=node,
        purpose=purpose,
        step=step,
        manifest=book.manifest_of(connection, step),
        temperature=config.generate.temperature if temperature is None else temperature,
        budget=config.generate.budget,
        nonce=hashlib.sha256(seeds.derive(book.step_secret(step), "lease nonce", lease)).hexdigest(),
        probe=seeds.probe_key(book.step_secret(step)).hex(),
        fingerprint=config.trust.fingerprint and purpose != "eval",
        expires_at=now + config.lease.lease_s,
        groups=list(_groups(connection, book.step_secret(step), shares, rows)),
    )


def _groups(
    connection: Connection, secret: bytes, shares: Sequence[Share], rows: Iterable[dict[str, Any]]
) -> Iterator[LeaseGroup]:
    rollout = {(row["group"], row["sample"]): row["rollout"] for row in rows}
    prompts = _prompts(connection, [share.task for share in shares])
    for share in shares:
        samples = [
            Sample(rollout=rollout[share.group, i], index=i, seed=seeds.sample_seed(secret, share.task, i))
            for i in share.samples
        ]
        yield LeaseGroup(group=str(share.group), prompt_ids=prompts[share.task], samples=samples)


def _prompts(connection: Connection, tasks: Sequence[str]) -> dict[str, bytes]:
    return {row.task: row.prompt_ids for row in connection.execute(_PROMPTS, {"tasks": tasks})}


_PROMPTS = sa.select(TASKS.c.task, TASKS.c.prompt_ids).where(TASKS.c.task.in_(sa.bindparam("tasks", expanding=True)))


# --- taking back -----------------------------------------------------------------------------------------------------


def expire(connection: Connection, book: Book, now: float, listening_since: float) -> int:
    """Take back leases whose deadline passed or whose node fell silent while somebody listened; gives how many."""
    lost_since = now - book.config.lease.lost_s
    silent = NODES.c.seen_at < (lost_since if listening_since < lost_since else 0.0)
    rows = connection.execute(
        sa.select(LEASES.c.lease, LEASES.c.node, LEASES.c.expires_at)
        .join(NODES, NODES.c.node == LEASES.c.node)
        .where(LEASES.c.run == book.run, LEASES.c.status == "open")
        .where(sa.or_(LEASES.c.expires_at < now, silent))
    ).all()
    for row in rows:
        why = "deadline passed" if row.expires_at < now else "node fell silent"
        end_leases(connection, [row.lease], "expired", now, why=why, node=row.node)
    return len(rows)


def lost_leases(connection: Connection, node: str, since: float) -> list[str]:
    """Leases that were lately taken from a node."""
    return list(connection.execute(_LOST, {"id": node, "since": since}).scalars())


_LOST = (
    sa.select(LEASES.c.lease)
    .where(
        LEASES.c.node == sa.bindparam("id"),
        LEASES.c.status.in_(("expired", "void")),
        LEASES.c.opened_at > sa.bindparam("since"),
    )
    .limit(1000)
)
