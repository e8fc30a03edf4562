"""Coordinator: tell people of rollouts that the environment cannot score, and of a run in which nothing is learned."""

import logging
import re
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from farflung.protocol.errors import ConfigError
from farflung.store.run import RunContext
from farflung.store.transitions import record

log = logging.getLogger(__name__)
MOST_KINDS = 8
"""So many kinds of faults are told; more come from texts, not from a mistake in the environment."""
MOST_UNSCORED = 16
NONE_SCORED = "none of the first rollouts could be scored"


def tell_fault(connection: Connection, run_ctx: RunContext, rollout: str, error: str, now: float) -> None:
    """Warn of the first fault of its kind."""
    kind = re.sub(r"\d+", "", error)[:100]
    if kind in run_ctx.faults or len(run_ctx.faults) >= MOST_KINDS:
        return
    run_ctx.faults[kind] = 0
    log.warning("unscorable rollout=%s because=%s", rollout, error)
    warn(connection, run_ctx, f"a rollout could not be scored: {error}", now)


def count_unscored(connection: Connection, run_ctx: RunContext, rollout: str, error: str, now: float) -> None:
    """Warn when so many rollouts were given up, and none scored, that no more will be.

    Once one was scored the environment can: a node that sends texts that it cannot judge stops no run.
    """
    run_ctx.faults[NONE_SCORED] = run_ctx.faults.get(NONE_SCORED, 0) + 1
    if run_ctx.faults[NONE_SCORED] == MOST_UNSCORED:
        said = f"{NONE_SCORED} ({MOST_UNSCORED} up to {rollout}): {error}; mend the environment, then use --resume"
        log.error("%s", said)
        warn(connection, run_ctx, said, now)


def count_scored(run_ctx: RunContext) -> None:
    """Some rollout was scored, so the environment can."""
    run_ctx.faults[NONE_SCORED] = MOST_UNSCORED


def refuse_unscorable(warnings: Sequence[str], known: Sequence[str]) -> None:
    """Raise ConfigError if a run has come to a warning, not among those known before, that nothing can be scored."""
    for warning in warnings:
        if warning.startswith(NONE_SCORED) and warning not in known:
            raise ConfigError(warning)


def tell_nothing_learned(
    connection: Connection, run_ctx: RunContext, step: int, groups: Sequence[Any], now: float
) -> None:
    """Warn after the first step if each of its groups has equal rewards: nothing can be learned from it."""
    if step != 1 or not groups or any(group.is_informative for group in groups):
        return
    rewards = {round(group.reward, 3) for group in groups}
    what = f"every answer earned {rewards.pop():g}" if len(rewards) == 1 else "all answers to a task earned the same"
    warn(
        connection,
        run_ctx,
        f"nothing could be learned from step 1: in each of its {len(groups)} groups {what}; look at some answers, at "
        "how they are matched and at generate.max_new_tokens, or take harder or easier tasks (farflung filter-tasks)",
        now,
    )


def warn(connection: Connection, run_ctx: RunContext, text: str, now: float) -> None:
    """Tell people who look at the run."""
    status = run_ctx.status(connection)
    record(connection, "run", [run_ctx.run], status, status, now, warning=text)
