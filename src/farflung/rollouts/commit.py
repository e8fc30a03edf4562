"""Coordinator: settle a step when the trainer commits it, and the run once its last step is."""

import json

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.audits import canary
from farflung.audits.unused import drop_groups, inspect
from farflung.protocol import seeds
from farflung.protocol.errors import Conflict, StepTaken
from farflung.protocol.messages import Commit, Manifest
from farflung.rollouts.accept import audits_waiting
from farflung.rollouts.select import step_row
from farflung.store import evaluations, payment
from farflung.store.run import RunContext
from farflung.store.tables import GROUPS, ROLLOUTS, STEPS
from farflung.store.transitions import move


def commit_step(
    connection: Connection,
    run_ctx: RunContext,
    digest: str,
    manifest: Manifest,
    commit: Commit,
    now: float,
) -> int:
    """End a step whose manifest was checked and whose shards are stored. Sent again, it changes nothing.

    Raises StepTaken if the step was committed with other weights, Conflict if it was never claimed.
    """
    row = step_row(connection, run_ctx, manifest.step)
    if row is None:
        raise Conflict(f"step {manifest.step} was not claimed; claim it before committing it")
    if row.status == "committed":
        if row.weights_digest != manifest.digest:
            raise StepTaken(f"step {manifest.step} is committed with weights {row.weights_digest[:12]}")
        return 0
    if commit.restores != (-1 if row.restores is None else row.restores):
        raise Conflict(f"step {manifest.step} was rolled back meanwhile; claim it again")
    _check_parent(connection, run_ctx, manifest)
    connection.execute(
        STEPS.update()
        .where(STEPS.c.id == row.id)
        .values(
            committed_at=now,
            manifest_digest=digest,
            manifest=msgspec.msgpack.encode(commit.manifest),
            weights_digest=manifest.digest,
            checkpoint=commit.checkpoint,
            metrics=json.dumps(commit.metrics),
            probe=commit.probe,
            probe_before=commit.probe_before,
            canaries=canary.keep(connection, run_ctx, manifest.step, commit.canaries, commit.canary_logp),
        )
    )
    move(connection, "step", [row.id], "open", "committed", now, weights=manifest.digest)
    _trained(connection, run_ctx, manifest.step, now)
    _drop_stale(connection, run_ctx, manifest.step, now)
    payment.mature(connection, run_ctx, now)
    if manifest.step >= run_ctx.config.run.steps:
        move(connection, "run", [run_ctx.run], "running", "finishing", now)
    return 1


def _check_parent(connection: Connection, run_ctx: RunContext, manifest: Manifest) -> None:
    """A manifest names its predecessor and the secret its step draws from. Raises Conflict."""
    parent = run_ctx.latest(connection).manifest
    if manifest.parent != parent:
        raise Conflict(f"step {manifest.step} follows manifest {manifest.parent[:12]!r}, the latest is {parent[:12]!r}")
    if manifest.secret_commitment != seeds.commitment(run_ctx.step_secret(manifest.step)).hex():
        raise Conflict(f"step {manifest.step} commits to another secret than the coordinator's; claim the step again")


def _trained(connection: Connection, run_ctx: RunContext, step: int, now: float) -> None:
    batch = sa.and_(GROUPS.c.run == run_ctx.run, GROUPS.c.batch_step == step, GROUPS.c.status == "batched")
    groups = list(connection.execute(sa.select(GROUPS.c.group).where(batch)).scalars())
    query = sa.select(ROLLOUTS.c.rollout).where(ROLLOUTS.c.group.in_(groups), ROLLOUTS.c.status == "batched")
    move(connection, "rollout", list(connection.execute(query).scalars()), "batched", "trained", now, step=step)
    move(connection, "group", groups, "batched", "trained", now, step=step)


def _drop_stale(connection: Connection, run_ctx: RunContext, latest: int, now: float) -> None:
    """Groups too old for the next step will never be trained on."""
    stale = sa.and_(
        GROUPS.c.run == run_ctx.run,
        GROUPS.c.purpose == "train",
        GROUPS.c.status.in_(("open", "complete")),
        GROUPS.c.step < latest - run_ctx.config.learn.max_staleness,
    )
    groups = list(connection.execute(sa.select(GROUPS.c.group).where(stale)).scalars())
    drop_groups(connection, run_ctx, groups, now, "stale")


def finish(connection: Connection, run_ctx: RunContext, now: float) -> bool:
    """End a run once its last policy is evaluated and no audit waits; nodes that were not ejected keep their credit."""
    if run_ctx.status(connection) != "finishing":
        return False
    if any(evaluations.left(connection, run_ctx.config, run_ctx.config.run.steps)):
        return False
    if audits_waiting(connection, run_ctx) or inspect(connection, run_ctx, ROLLOUTS.c.status == "accepted", now):
        return False  # rollouts that no step took are looked at before they are paid for good
    payment.settle(connection, run_ctx, now)
    move(connection, "run", [run_ctx.run], "finishing", "finished", now)
    return True
