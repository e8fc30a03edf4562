"""Coordinator: lease samples to nodes, take lapsed ones back. `assign.py` chooses; here the choice becomes rows.

A node has at most one open lease. Asking again, after a lost answer or a crash, gives the same one.
"""

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.protocol import seeds
from farflung.protocol.errors import Ejected, Refusal
from farflung.protocol.identity import Signed, seal
from farflung.protocol.messages import Latest, Lease, LeaseGroup, LeaseRequest, Sample
from farflung.protocol.states import REOPENING
from farflung.store import heldout
from farflung.store.book import Book, new_id
from farflung.store.db import after_commit, end_leases, record, slices
from farflung.store.heldout import HELD_OUT, Part
from farflung.store.rows import insert_rows
from farflung.store.tables import AUDITS, GROUPS, LEASES, NODES, ROLLOUTS, STEPS, TASKS
from farflung.tasks.assign import Asker, AssignSettings, NextTask, OpenSamples, Plan, Share, Wait, task_order
from farflung.tasks.shelf import Shelf

KIND = "lease"
ANY_CONTEXT = 1 << 40
ORDERS_KEPT = 8
LOOK_AHEAD, MOST_LOOK_AHEAD = 4, 256
"""Tasks looked up at once when groups are opened: few at first, for mostly the first will do."""


Answer = Signed | Wait | Refusal


@dataclass(frozen=True, slots=True)
class Ask:
    """A registered node that asks for work."""

    node: Row[Any]
    wish: LeaseRequest


def issue(connection: Connection, book: Book, asks: Sequence[Ask], now: float) -> list[Answer]:
    """For each, in order: a sealed lease, why there is none now, or a refusal. Who asks twice gets the same answer."""
    asking = {ask.node.node: ask for ask in reversed(asks)}
    latest, papers = book.latest(connection), _Papers(connection, book, list(asking), now)
    known = {node: _without_work(ask.node, latest, papers) for node, ask in asking.items()}
    answers: dict[str, Answer] = {node: answer for node, answer in known.items() if answer is not None}
    left = [ask for node, ask in asking.items() if node not in answers]
    for ask in left:
        if ask.node.role == "validator":
            answers[ask.node.node] = _issue_eval(connection, book, ask.node, ask.wish, latest.step, now)
    workers = [ask for ask in left if ask.node.role == "worker"]
    # in lockstep one lease may fill a step, so that the next is of another
    for part in ([ask] for ask in workers) if book.config.learn.lockstep else [workers] if workers else ():
        answers |= _issue_train(connection, book, part, latest.step, now)
    return [answers[ask.node.node] for ask in asks]


class _Papers:
    """What is known of the nodes of a set: the leases that they hold, and how often they gave one up."""

    def __init__(self, connection: Connection, book: Book, nodes: Sequence[str], now: float) -> None:
        self._most_s, self._now = book.config.lease.lease_s, now
        self.held = {row.node: row.document for row in connection.execute(_HELD, {"ids": nodes, "of": book.run})}
        since = now - 2 * self._most_s
        self._given_up = {row[0]: row[1:] for row in connection.execute(_ABANDONED, {"ids": nodes, "since": since})}

    def pause_s(self, node: str) -> float:
        """How long a node that hands leases back or lets them lapse has to wait: 1 s, and twice that after each more.

        Otherwise one that refuses whatever it is given, because its disk is full, say, would be leased without end,
        and keys that do nothing would take all work.
        """
        count, last = self._given_up.get(node, (0, 0.0))
        return last + min(2.0 ** min(count - 1, 30), self._most_s) - self._now if count else 0.0


_HELD = sa.select(LEASES.c.node, LEASES.c.document).where(
    LEASES.c.node.in_(sa.bindparam("ids", expanding=True)),
    LEASES.c.run == sa.bindparam("of"),
    LEASES.c.status == "open",
)

_ABANDONED = (
    sa.select(LEASES.c.node, sa.func.count(), sa.func.max(LEASES.c.opened_at))
    .where(
        LEASES.c.node.in_(sa.bindparam("ids", expanding=True)),
        LEASES.c.status.in_(("returned", "expired")),
        LEASES.c.opened_at > sa.bindparam("since"),
    )
    .group_by(LEASES.c.node)
)


def _without_work(node: Row[Any], latest: Latest, papers: _Papers) -> Answer | None:
    """The answer to a node for which no new lease is to be looked for."""
    if node.status == "ejected":
        return Ejected(f"node {node.node} was ejected for failing verification; GET /v1/story/{node.node} says why")
    if (document := papers.held.get(node.node)) is not None:
        return msgspec.msgpack.decode(document, type=Signed)
    if latest.step < 0:
        return Wait("the trainer has not published the first weights yet")
    if node.role == "validator":
        return None
    if (pause_s := papers.pause_s(node.node)) > 0:
        return Wait(f"node {node.node} handed a lease back; the next one comes in {pause_s:.0f} s")
    if latest.status != "running" or node.role != "worker" or node.status == "quarantined":
        return Wait(f"the run is {latest.status} and node {node.node} is a {node.status} {node.role}")
    return None


class _Probation:
    """The slots for nodes on probation: few, and shared by all new keys, so ten thousand of them slow only each other.

    Whoever holds a lease or waits for a replay has one.
    """

    def __init__(self, connection: Connection, book: Book) -> None:
        self._trust = book.config.trust
        waiting = (
            sa.select(AUDITS.c.node, sa.func.count())
            .join(NODES, NODES.c.node == AUDITS.c.node)
            .where(AUDITS.c.run == book.run, AUDITS.c.status.in_(("open", "claimed")), NODES.c.status == "probation")
            .group_by(AUDITS.c.node)
        )
        leased = (
            sa.select(LEASES.c.node)
            .join(NODES, NODES.c.node == LEASES.c.node)
            .where(LEASES.c.run == book.run, LEASES.c.status == "open", NODES.c.status == "probation")
        )
        self._waiting: dict[str, int] = {row[0]: row[1] for row in connection.execute(waiting)}
        self.taken = {*self._waiting, *connection.execute(leased.where(NODES.c.role == "worker")).scalars()}

    def why_not(self, node: str) -> str:
        """Why a node on probation has to wait, or nothing: until its own last work is replayed, and for a slot."""
        if self._waiting.get(node, 0) >= self._trust.probation_waiting:
            return f"node {node} is on probation and what it sent waits for its replay"
        if node not in self.taken and len(self.taken) >= self._trust.probation_slots:
            most = self._trust.probation_slots
            return f"{len(self.taken)} nodes on probation work or wait for their replays; {most} may at a time"
        return ""


# --- training --------------------------------------------------------------------------------------------------------


def _issue_train(connection: Connection, book: Book, asks: Sequence[Ask], latest: int, now: float) -> dict[str, Answer]:
    """Lease training work to nodes, one after the other."""
    if book.config.learn.lockstep:
        latest = _unfilled(connection, book, latest)
    settings = assign_settings(book, latest)
    groups = _open_groups(connection, book, latest - settings.max_staleness)
    owned, reopened = _owners(connection, [row.group for row in groups])
    shelf = Shelf(
        latest,
        _open_samples(book, groups, owned, reopened),
        _groups_now(connection, book, latest),
        lambda step: _next_tasks(connection, book, step, LOOK_AHEAD + len(asks)),
        partial(new_id, "g"),
        settings,
    )
    is_any_new = any(ask.node.status == "probation" for ask in asks)
    probation = _Probation(connection, book) if is_any_new else None
    found = {ask.node.node: _plan(shelf, probation, ask, now) for ask in asks}
    plans = {node: plan for node, plan in found.items() if isinstance(plan, Plan)}
    waits = {node: wait for node, wait in found.items() if isinstance(wait, Wait)}
    return waits | _write(connection, book, plans, "train", now, reopened)


def _plan(shelf: Shelf, probation: _Probation | None, ask: Ask, now: float) -> Plan | Wait:
    node, wish = ask.node, ask.wish
    is_new = probation is not None and node.status == "probation"
    if is_new and (why := probation.why_not(node.node)):
        return Wait(why)
    asker = Asker(wish.loaded_step if wish.loaded_step >= 0 else None, wish.slots, wish.context or ANY_CONTEXT)
    plan = shelf.take(asker, now)
    if is_new and isinstance(plan, Plan):
        probation.taken.add(node.node)
    return plan


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


Samples = dict[str, set[int]]
"""Group → some of its samples."""


def _open_samples(book: Book, groups: Sequence[Row[Any]], owned: Samples, reopened: Samples) -> Iterator[OpenSamples]:
    """Samples of these groups that nobody has, those that somebody had before apart from the rest."""
    for row in groups:
        free = set(range(row.samples)) - owned[row.group]
        needed = row.prompt_bytes // 4 + book.config.generate.budget
        for samples, at in ((free - reopened[row.group], None), (free & reopened[row.group], row.opened_at)):
            if samples:
                yield OpenSamples(row.group, row.task, row.step, tuple(sorted(samples)), needed, at)


_OWNERS = sa.select(ROLLOUTS.c.group, ROLLOUTS.c.sample, ROLLOUTS.c.status).where(
    ROLLOUTS.c.group.in_(sa.bindparam("groups", expanding=True))
)


def _owners(connection: Connection, groups: Sequence[str]) -> tuple[Samples, Samples]:
    """The samples of these groups that somebody has, and those that somebody had and that are open again."""
    owned: Samples = defaultdict(set)
    reopened: Samples = defaultdict(set)
    for part in slices(groups):
        for group, sample, status in connection.execute(_OWNERS, {"groups": part}):
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


def _next_tasks(connection: Connection, book: Book, step: int, size: int) -> Iterator[NextTask]:
    """Tasks not opened at this step yet, in the order that its secret draws; `size` are looked up at first."""
    order = _order(book, step)
    start = order.begin
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
        shares, reopened = _eval_shares(connection, book, step, part, max(1, size // part.samples))
        if shares:
            old, new = (tuple(s for s in shares if bool(s.group) is is_open) for is_open in (True, False))
            plan = Plan(step, old, tuple(replace(share, group=new_id("g")) for share in new))
            return _write(connection, book, {node.node: plan}, part.purpose, now, reopened)[node.node]
    return Wait("nothing to evaluate")


def _eval_shares(connection: Connection, book: Book, step: int, part: Part, most: int) -> tuple[list[Share], Samples]:
    """The samples that nobody has of up to `most` held-out tasks at this step, and those that are open again."""
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
    owned, reopened = _owners(connection, [row.group for row in rows if row.group])
    free = [(row, set(range(row.samples or part.samples)) - owned.get(row.group, set())) for row in rows]
    return [Share(row.group, row.task, tuple(sorted(samples))) for row, samples in free if samples], reopened


# --- rows ------------------------------------------------------------------------------------------------------------


def _write(
    connection: Connection, book: Book, plans: Mapping[str, Plan], purpose: str, now: float, reopened: Samples
) -> dict[str, Signed]:
    """Open the groups, the leases and their rollouts, and seal the documents: for every node, its lease."""
    if not plans:
        return {}
    _open(connection, book, plans.values(), purpose, now)
    prompts = _prompts(connection, {share.task for plan in plans.values() for share in plan.shares})
    drafts = [_draft(connection, book, node, plan, purpose, prompts, now) for node, plan in plans.items()]
    signed = {draft.node: seal(book.key, KIND, draft) for draft in drafts}
    insert_rows(connection, LEASES, [_lease_row(draft, signed[draft.node], now) for draft in drafts])
    insert_rows(connection, ROLLOUTS, [row for draft in drafts for row in _rollout_rows(draft, reopened)])
    for draft in drafts:
        rollouts = [sample.rollout for group in draft.groups for sample in group.samples]
        record(
            connection,
            "lease",
            [draft.lease],
            "",
            "open",
            now,
            node=draft.node,
            step=draft.step,
            rollouts=len(rollouts),
        )
        record(connection, "rollout", rollouts, "", "leased", now, lease=draft.lease, node=draft.node)
    return signed


def _open(connection: Connection, book: Book, plans: Collection[Plan], purpose: str, now: float) -> None:
    """Open the groups that these plans open, and take their samples."""
    taken = Counter[str]()
    for plan in plans:
        taken.update({str(share.group): len(share.samples) for share in plan.shares})
    samples = next(
        (part.samples for part in heldout.parts(book.config) if part.purpose == purpose), book.config.generate.samples
    )
    common = {"run": book.run, "purpose": purpose, "status": "open", "opened_at": now, "samples": samples}
    opened = [
        common | {"step": plan.step, "group": share.group, "task": share.task, "free": samples - taken.pop(share.group)}
        for plan in plans
        for share in plan.opened
    ]
    insert_rows(connection, GROUPS, opened)
    if taken:
        connection.execute(_FEWER_FREE, [{"of": group, "fewer": count} for group, count in taken.items()])
    for step, count in Counter(row["step"] for row in opened).items():
        if purpose == "train":
            connection.execute(_MORE_OPEN, {"of": book.run, "at": step, "more": count})
        groups = [row["group"] for row in opened if row["step"] == step]
        record(connection, "group", groups, "", "open", now, step=step)


_FEWER_FREE = (
    GROUPS.update().where(GROUPS.c.group == sa.bindparam("of")).values(free=GROUPS.c.free - sa.bindparam("fewer"))
)

_MORE_OPEN = (
    STEPS.update()
    .where(STEPS.c.run == sa.bindparam("of"), STEPS.c.step == sa.bindparam("at"))
    .values(open_groups=STEPS.c.open_groups + sa.bindparam("more"))
)


def _draft(
    connection: Connection, book: Book, node: str, plan: Plan, purpose: str, prompts: Mapping[str, bytes], now: float
) -> Lease:
    config, lease, secret = book.config, new_id("l"), book.step_secret(plan.step)
    heat = next((part.temperature for part in heldout.parts(config) if part.purpose == purpose), None)
    told: Any = "eval" if purpose in HELD_OUT else purpose
    return Lease(
        lease=lease,
        run=book.run,
        node=node,
        purpose=told,
        step=plan.step,
        manifest=book.manifest_of(connection, plan.step),
        temperature=config.generate.temperature if heat is None else heat,
        budget=config.generate.budget,
        nonce=hashlib.sha256(seeds.derive(secret, "lease nonce", lease)).hexdigest(),
        probe=seeds.probe_key(secret).hex(),
        fingerprint=config.trust.fingerprint and told != "eval",
        expires_at=now + config.lease.lease_s,
        groups=[_lease_group(secret, share, prompts) for share in plan.shares],
    )


def _lease_group(secret: bytes, share: Share, prompts: Mapping[str, bytes]) -> LeaseGroup:
    samples = [
        Sample(rollout=new_id("r"), index=index, seed=seeds.sample_seed(secret, share.task, index))
        for index in share.samples
    ]
    return LeaseGroup(group=str(share.group), prompt_ids=prompts[share.task], samples=samples)


def _lease_row(draft: Lease, signed: Signed, now: float) -> dict[str, Any]:
    row = {"lease": draft.lease, "run": draft.run, "node": draft.node, "step": draft.step, "purpose": draft.purpose}
    row |= {"status": "open", "opened_at": now, "expires_at": draft.expires_at}
    return row | {"document": msgspec.msgpack.encode(signed)}


def _rollout_rows(draft: Lease, reopened: Samples) -> Iterator[dict[str, Any]]:
    common = {"run": draft.run, "lease": draft.lease, "node": draft.node, "status": "leased"}
    for group in draft.groups:
        for sample in group.samples:
            is_reissue = sample.index in reopened.get(group.group, ())
            own = {"rollout": sample.rollout, "sample": sample.index, "is_reissue": is_reissue}
            yield common | own | {"group": group.group}


def _prompts(connection: Connection, tasks: Collection[str]) -> dict[str, bytes]:
    return {row.task: row.prompt_ids for row in connection.execute(_PROMPTS, {"tasks": list(tasks)})}


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
