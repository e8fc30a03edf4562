"""`farflung chaos`: a swarm on this machine, faults on a seeded schedule, and what each of them cost.

The same run without faults comes first. Throughput is accepted tokens ÷ (the workers' pace × the time they were alive):
a dead machine costs no throughput, but work that dies with it, is waited for or done twice does.
"""

import asyncio
import contextlib
import statistics
from typing import Any

import sqlalchemy as sa
from rich.table import Table
from sqlalchemy import Connection

from farflung.adversity.chaos_swarm import ChaosSwarm
from farflung.adversity.faults import Fault, Postgres, schedule
from farflung.adversity.recovery import settle
from farflung.config import Config
from farflung.launch.swarm import prepare
from farflung.launch.terminal import Terminal
from farflung.ops.invariants import violations
from farflung.protocol.errors import ConfigError
from farflung.store.sql_connections import open_engine
from farflung.store.tables import EVENTS, GROUPS, LEASES, ROLLOUTS, STEPS

CALM_SHARE, LEAST_CALM_S = 1 / 6, 15.0
"""How long the run without faults is: its throughput is known to half a percent after five minutes."""
Row = dict[str, Any]


def run_chaos(config: Config, minutes: float, *, is_quiet: bool = False) -> Row:
    """A run without faults, then one with them; gives what is printed as JSON. Raises ConfigError."""
    if not config.worker.pace_tokens_per_s:
        raise ConfigError("worker.pace_tokens_per_s is 0; set a pace that this machine keeps with half of its cores")
    calm, _ = _one_run(_named(config, "calm"), max(LEAST_CALM_S, 60 * minutes * CALM_SHARE), [])
    faults = schedule(config.chaos.seed, 60 * minutes, config.chaos.every_s)
    disturbed, wrong = _one_run(_named(config, "chaos"), 60 * minutes, faults)
    result = _result(faults, calm, disturbed, wrong)
    if not is_quiet:
        show(faults, result)
    return result


def _named(config: Config, suffix: str) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"name": f"{config.run.name}-{suffix}"})})


def _one_run(config: Config, seconds: float, faults: list[Fault]) -> tuple[Row, list[str]]:
    prepare(config, fresh=True)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Postgres(config.folder / "postgres")) if config.chaos.postgres else None
        if server is not None:
            coordinator = config.coordinator.model_copy(update={"database": server.url})
            config = config.model_copy(update={"coordinator": coordinator})
        swarm = ChaosSwarm(config, seconds, faults, server)
        asyncio.run(swarm.run())
        engine = open_engine(config.database_url)
        stack.callback(engine.dispose)
        with engine.connect() as connection:
            restarts = [line for line in swarm.metrics.lines() if line["kind"] == "restart"]
            for fault in faults:
                settle(connection, fault, restarts)
            return _measured(connection, swarm), violations(connection, swarm.config)


def _measured(connection: Connection, swarm: ChaosSwarm) -> Row:
    """Accepted tokens against what the living workers should have made, and the rewards."""
    between = sa.and_(EVENTS.c.at >= swarm.began, EVENTS.c.at < swarm.ended)
    of = sa.and_(EVENTS.c.noun == "rollout", EVENTS.c.after == "accepted", between, GROUPS.c.purpose == "train")
    subjects = sa.select(ROLLOUTS.c.rollout, ROLLOUTS.c.tokens).join(EVENTS, EVENTS.c.subject == ROLLOUTS.c.rollout)
    rows = set(connection.execute(subjects.join(GROUPS, GROUPS.c.group == ROLLOUTS.c.group).where(of)).tuples())
    tokens = sum(row[1] for row in rows)
    alive = sum(_overlap(a, b or swarm.ended, swarm) for lives in swarm.alive.values() for a, b in lives)
    rewards = list(
        connection.execute(sa.select(STEPS.c.seen_reward).where(STEPS.c.step > 0).order_by(STEPS.c.step)).scalars()
    )
    third = max(1, len(rewards) // 3)
    expired = sa.select(sa.func.count()).where(LEASES.c.status == "expired")
    return {
        "seconds": round(swarm.ended - swarm.began, 1),
        "accepted_tokens": tokens,
        "worker_seconds": round(alive, 1),
        "throughput": tokens / (swarm.config.worker.pace_tokens_per_s * alive) if alive else 0.0,
        "steps": len(rewards),
        "reward_first": round(statistics.fmean(rewards[:third]), 3) if rewards else None,
        "reward_last": round(statistics.fmean(rewards[-third:]), 3) if rewards else None,
        "leases_expired": connection.execute(expired).scalar_one(),
    }


def _overlap(start: float, end: float, swarm: ChaosSwarm) -> float:
    return max(0.0, min(end, swarm.ended) - max(start, swarm.began))


def _median(values: list[float]) -> float | None:
    return round(statistics.median(values), 2) if values else None


def _result(faults: list[Fault], calm: Row, disturbed: Row, wrong: list[str]) -> Row:
    done = [fault for fault in faults if not fault.skipped]
    noticed = [fault for fault in done if fault.detected_s or fault.recovered_s]
    of_trainer = [fault.recovered_s for fault in noticed if fault.role == "trainer" and fault.recovered_s is not None]
    return {
        "faults": len(done),
        "skipped": sorted({f"{fault.kind} {fault.role}: {fault.skipped}" for fault in faults if fault.skipped}),
        "by_role": {role: sum(f.role == role for f in done) for role in sorted({f.role for f in done})},
        "throughput_kept": round(disturbed["throughput"] / calm["throughput"], 4) if calm["throughput"] else 0.0,
        "noticed": len(noticed),
        "detection_median_s": _median([f.detected_s for f in noticed if f.detected_s is not None]),
        "recovery_median_s": _median([f.recovered_s for f in noticed if f.recovered_s is not None]),
        "recovery_trainer_median_s": _median(of_trainer),
        "recovery_trainer_max_s": round(max(of_trainer), 2) if of_trainer else None,
        "lost_tokens": sum(fault.lost_tokens for fault in done),
        "never_recovered": [f"{f.kind} {f.victim}" for f in noticed if f.recovered_s is None],
        "invariant_violations": len(wrong),
        "violations": wrong[:20],
        "calm": calm,
        "chaos": disturbed,
    }


def show(faults: list[Fault], result: Row) -> None:
    """A table for people."""
    table = Table("at s", "fault", "victim", "detected s", "recovered s", "lost tokens", "lost lease", box=None)
    for fault in faults:
        seen = [f"{value:.2f}" if value is not None else "–" for value in (fault.detected_s, fault.recovered_s)]
        table.add_row(
            f"{fault.due_s:.0f}", fault.kind, fault.victim, *seen, str(fault.lost_tokens), fault.skipped or fault.lease
        )
    console = Terminal()
    console.print(table)
    for sentence in result["violations"]:
        console.print(f"broken: {sentence}")
    console.print(f"throughput kept {result['throughput_kept']:.3f} through {result['faults']} faults")
