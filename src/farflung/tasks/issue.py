"""Coordinator: plans of leases become rows and sealed documents, those of many nodes together."""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.protocol import seeds
from farflung.protocol.identity import Signed, seal
from farflung.protocol.messages import Lease, LeaseGroup, Sample
from farflung.store import evaluations
from farflung.store.bulk import insert_rows
from farflung.store.evaluations import HELD_OUT
from farflung.store.run import RunContext, new_id
from farflung.store.tables import GROUPS, LEASES, ROLLOUTS, STEPS, TASKS
from farflung.store.transitions import record
from farflung.tasks.assign import Plan, Share
from farflung.tasks.candidates import Samples
from farflung.tasks.deadline import first_lives

KIND = "lease"
Asking = tuple[str, int]
"""A node and the device of it that asks."""


def write(
    connection: Connection,
    run_ctx: RunContext,
    plans: Mapping[Asking, Plan],
    purpose: str,
    now: float,
    reopened: Samples,
) -> dict[Asking, Signed]:
    """Open the groups, the leases and their rollouts, and seal the documents: for every device of a node, its lease."""
    if not plans:
        return {}
    _open(connection, run_ctx, plans.values(), purpose, now)
    prompts = _prompts(connection, {share.task for plan in plans.values() for share in plan.shares})
    samples = {asking: sum(len(share.samples) for share in plan.shares) for asking, plan in plans.items()}
    most = {asking: count * run_ctx.config.generate.max_new_tokens for asking, count in samples.items()}
    lives = first_lives(connection, run_ctx, most, now)
    drafts = {
        asking: _draft(connection, run_ctx, asking[0], plan, purpose, prompts, now + lives[asking])
        for asking, plan in plans.items()
    }
    signed = {asking: seal(run_ctx.key, KIND, draft) for asking, draft in drafts.items()}
    rows = [_lease_row(draft, asking[1], signed[asking], now) for asking, draft in drafts.items()]
    insert_rows(connection, LEASES, rows)
    rows = [row for draft in drafts.values() for row in _rollout_rows(draft, reopened)]
    insert_rows(connection, ROLLOUTS, rows)
    _mark_reissued(connection, [row["rollout"] for row in rows if row["is_reissue"]])
    for draft in drafts.values():
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


def _open(connection: Connection, run_ctx: RunContext, plans: Collection[Plan], purpose: str, now: float) -> None:
    """Open the groups that these plans open, and take their samples."""
    taken = Counter[str]()
    for plan in plans:
        taken.update({str(share.group): len(share.samples) for share in plan.shares})
    samples = next(
        (part.samples for part in evaluations.parts(run_ctx.config) if part.purpose == purpose),
        run_ctx.config.generate.samples,
    )
    common = {"run": run_ctx.run, "purpose": purpose, "status": "open", "opened_at": now, "samples": samples}
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
            connection.execute(_MORE_OPEN, {"of": run_ctx.run, "at": step, "more": count})
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
    connection: Connection,
    run_ctx: RunContext,
    node: str,
    plan: Plan,
    purpose: str,
    prompts: Mapping[str, bytes],
    expires_at: float,
) -> Lease:
    config, lease, secret = run_ctx.config, new_id("l"), run_ctx.step_secret(plan.step)
    temperature = next((part.temperature for part in evaluations.parts(config) if part.purpose == purpose), None)
    shown_purpose: Any = "eval" if purpose in HELD_OUT else purpose
    return Lease(
        lease=lease,
        run=run_ctx.run,
        node=node,
        purpose=shown_purpose,
        step=plan.step,
        manifest=run_ctx.manifest_of(connection, plan.step),
        temperature=config.generate.temperature if temperature is None else temperature,
        max_new_tokens=config.generate.max_new_tokens,
        nonce=hashlib.sha256(seeds.derive(secret, "lease nonce", lease)).hexdigest(),
        probe=seeds.probe_key(secret).hex(),
        expires_at=expires_at,
        groups=[_lease_group(secret, share, prompts) for share in plan.shares],
    )


def _lease_group(secret: bytes, share: Share, prompts: Mapping[str, bytes]) -> LeaseGroup:
    samples = [
        Sample(rollout=new_id("r"), index=index, seed=seeds.sample_seed(secret, share.task, index))
        for index in share.samples
    ]
    return LeaseGroup(group=str(share.group), prompt_ids=prompts[share.task], samples=samples)


def _lease_row(draft: Lease, device: int, signed: Signed, now: float) -> dict[str, Any]:
    row = {"device": device} | {
        "lease": draft.lease,
        "run": draft.run,
        "node": draft.node,
        "step": draft.step,
        "purpose": draft.purpose,
    }
    row |= {"status": "open", "opened_at": now, "expires_at": draft.expires_at}
    return row | {"document": msgspec.msgpack.encode(signed)}


def _rollout_rows(draft: Lease, reopened: Samples) -> Iterator[dict[str, Any]]:
    common = {"run": draft.run, "lease": draft.lease, "node": draft.node, "status": "leased"}
    for group in draft.groups:
        for sample in group.samples:
            is_reissue = sample.index in reopened.get(group.group, ())
            own = {"rollout": sample.rollout, "sample": sample.index, "is_reissue": is_reissue}
            yield common | own | {"group": group.group}


def _mark_reissued(connection: Connection, rollouts: Collection[str]) -> None:
    """Note on the leases that had these samples before and ended with nothing that others have their work."""
    if rollouts:
        connection.execute(_REISSUED, {"fresh": list(rollouts)})


_AGAIN = ROLLOUTS.alias()
_BEFORE = (
    sa.select(ROLLOUTS.c.lease)
    .join(_AGAIN, sa.and_(_AGAIN.c.group == ROLLOUTS.c.group, _AGAIN.c.sample == ROLLOUTS.c.sample))
    .where(_AGAIN.c.rollout.in_(sa.bindparam("fresh", expanding=True)), _AGAIN.c.lease != ROLLOUTS.c.lease)
)
_REISSUED = (
    LEASES.update()
    .where(LEASES.c.lease.in_(_BEFORE), LEASES.c.status.in_(("expired", "returned")), ~LEASES.c.is_reissued)
    .values(is_reissued=True)
)


def _prompts(connection: Connection, tasks: Collection[str]) -> dict[str, bytes]:
    return {row.task: row.prompt_ids for row in connection.execute(_PROMPTS, {"tasks": list(tasks)})}


_PROMPTS = sa.select(TASKS.c.task, TASKS.c.prompt_ids).where(TASKS.c.task.in_(sa.bindparam("tasks", expanding=True)))
