"""The figures of a run, recomputed from its database and metrics.jsonl, and written as summary.json.

Names are a contract; docs/metrics.md says what each means and how it is measured.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from farflung.config import Config, load_run
from farflung.protocol.identity import Key
from farflung.protocol.messages import EvalView
from farflung.queries import evals, views
from farflung.queries.cost import Worked, cost_usd, last_per_process, overhead, used
from farflung.store.metrics import Metrics
from farflung.store.sql_connections import reading
from farflung.store.tables import AUDITS, EVENTS, NODES, ROLLOUTS, SUBMISSIONS, VERDICTS

Line = dict[str, Any]

_EDGE = 5
"""Steps whose mean reward says where a run began and where it ended."""


def write_summary(folder: Path) -> dict[str, Any]:
    """Compute and write summary.json."""
    figures = summarise(folder)
    (folder / "summary.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def summarise(folder: Path) -> dict[str, Any]:
    """All figures of the run in `folder`. Raises ConfigError if there is none."""
    config = load_run(folder)
    lines = list(Metrics(folder / "metrics.jsonl").lines())
    with reading(config.database_url) as connection:
        return _summary(connection, config, lines)


def _summary(connection: Connection, config: Config, lines: list[Line]) -> dict[str, Any]:
    run = config.run.name
    start = next((line["at"] for line in lines if line["kind"] == "start"), 0.0)
    worked, last = Worked(), last_per_process(lines)
    for line in lines:
        worked.take(line)
    steps = views.steps(connection, run)
    first_reward, last_reward = first_and_last([step.reward for step in steps])
    figures: dict[str, Any] = {
        "run": run,
        "seed": config.run.seed,
        "commit": next((line.get("commit", "") for line in lines if line["kind"] == "start"), ""),
        "steps": len(steps),
        "wall_s": round(worked.seconds, 2),
        "first_reward_s": _first_reward(connection, run, start),
        "reward_first": first_reward,
        "reward_last": last_reward,
        **_evals(connection, config),
        **_tokens(connection, run),
        **_rollouts(connection, run),
        **_audits(connection, run),
        **_work(connection, config, lines),
        **_nodes(connection, config),
        "leases_reissued": views.reissued(connection, run),
        **_trainer(steps),
        **_weights(lines, steps),
    }
    lives = [(line["role"], worked.lived_s[process]) for process, line in last.items()]
    cost = cost_usd(lives, worked.seconds, config)
    verified = figures["tokens_verified"]
    figures["cost_usd"] = round(cost, 6)
    figures["usd_per_million_verified_tokens"] = round(cost / verified * 1e6, 4) if verified else None
    return figures


def first_and_last(rewards: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean of the first and of the last five steps' rewards, of each half where there are fewer than ten.

    One step of a few groups says little: in the demo's first steps its standard deviation is 0.1.
    """
    count = max(1, min(_EDGE, len(rewards) // 2))
    return (statistics.fmean(rewards[:count]), statistics.fmean(rewards[-count:])) if rewards else (None, None)


def _first_reward(connection: Connection, run: str, start: float) -> float | None:
    """Seconds from the command to the first accepted rollout."""
    query = (
        sa.select(sa.func.min(EVENTS.c.at))
        .join(ROLLOUTS, ROLLOUTS.c.rollout == EVENTS.c.subject)
        .where(ROLLOUTS.c.run == run, EVENTS.c.noun == "rollout", EVENTS.c.after == "accepted")
    )
    at = connection.execute(query).scalar()
    return None if at is None else round(max(0.0, at - start), 2)


def _evals(connection: Connection, config: Config) -> dict[str, Any]:
    held_out = evals.evals(connection, config)
    found = {view.step: view for view in held_out}
    before, after = found.get(0), found.get(config.run.steps)
    return {
        "eval_before": before.score if before else None,
        "eval_after": after.score if after else None,
        "eval_tasks": after.tasks if after else before.tasks if before else 0,
        "eval_before_interval": [before.low, before.high] if before else None,
        "eval_after_interval": [after.low, after.high] if after else None,
        "pass_k": config.eval.k if config.eval.samples else None,
        "pass_k_before": before.pass_k if before else None,
        "pass_k_after": after.pass_k if after else None,
        "pass_k_before_interval": _span_of_pass_k(before),
        "pass_k_after_interval": _span_of_pass_k(after),
        "evals": [msgspec.to_builtins(view) for view in held_out],
    }


def _span_of_pass_k(view: EvalView | None) -> list[float | None] | None:
    return None if view is None or view.pass_k is None else [view.pass_k_low, view.pass_k_high]


def _tokens(connection: Connection, run: str) -> dict[str, int]:
    generated = sa.select(sa.func.coalesce(sa.func.sum(SUBMISSIONS.c.tokens), 0)).join(
        NODES, NODES.c.node == SUBMISSIONS.c.node
    )
    trained = sa.select(sa.func.coalesce(sa.func.sum(ROLLOUTS.c.tokens), 0))
    trained = trained.where(ROLLOUTS.c.run == run, ROLLOUTS.c.status == "trained")
    return {
        "tokens_generated": int(
            connection.execute(generated.where(SUBMISSIONS.c.run == run, NODES.c.role == "worker")).scalar_one()
        ),
        "tokens_verified": int(views.accepted(connection, run)[1]),
        "tokens_trained": int(connection.execute(trained).scalar_one()),
    }


def _rollouts(connection: Connection, run: str) -> dict[str, int]:
    by_worker = sa.and_(NODES.c.role == "worker", ROLLOUTS.c.run == run)
    count = sa.select(sa.func.count()).select_from(ROLLOUTS.join(NODES, NODES.c.node == ROLLOUTS.c.node))
    submitted = count.where(by_worker, ROLLOUTS.c.submission.is_not(None))
    rejected = count.where(by_worker, ROLLOUTS.c.status.in_(("rejected", "void")))
    return {
        "rollouts_submitted": connection.execute(submitted).scalar_one(),
        "rollouts_accepted": views.accepted(connection, run)[0],
        "rollouts_rejected": connection.execute(rejected).scalar_one(),
    }


def _audits(connection: Connection, run: str) -> dict[str, Any]:
    rows = connection.execute(
        sa.select(AUDITS.c.rollouts).where(AUDITS.c.run == run, AUDITS.c.status == "done")
    ).scalars()
    audited = [len(json.loads(text)) for text in rows]
    submitted = _rollouts(connection, run)["rollouts_submitted"]
    return {"audits": len(audited), "audited_fraction": round(sum(audited) / submitted, 4) if submitted else 0.0}


# --- time and money --------------------------------------------------------------------------------------------------


def _work(connection: Connection, config: Config, lines: list[Line]) -> dict[str, Any]:
    lives = last_per_process(lines).values()
    share = overhead(lives, config.prices)
    return {
        "cpu_s_by_role": _by_role((line["role"], line["cpu_s"]) for line in lives),
        "device_s_by_role": _by_role((line["role"], line.get("work_device_s", 0.0)) for line in lives),
        "verification_overhead": None if share is None else round(share, 4),
        "verification_overhead_steady": steady(connection, config, lines),
    }


def _by_role(seconds: Iterable[tuple[str, float]]) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for role, one in seconds:
        found[role] += one
    return {role: round(one, 2) for role, one in sorted(found.items()) if one}


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole > 0 else None


def steady(connection: Connection, config: Config, lines: list[Line]) -> float | None:
    """The overhead since the last node that was on probation came to be trusted, or ejected; None if none is trusted.

    A process's work until then stands in its first heartbeat after that.
    """
    waiting = sa.select(sa.func.count()).where(NODES.c.role == "worker", NODES.c.status == "probation")
    seen_alive = waiting.where(NODES.c.phase != "", NODES.c.node.in_(_submitters(config.run.name)))
    killed = {line["node"] for line in lines if line["kind"] == "kill"}
    if connection.execute(seen_alive.where(NODES.c.node.not_in(killed))).scalar_one():
        return None
    settled = sa.and_(EVENTS.c.noun == "node", EVENTS.c.after.in_(("trusted", "ejected")))
    query = sa.select(EVENTS.c.subject, EVENTS.c.after, EVENTS.c.at).where(settled)
    events = connection.execute(query.order_by(EVENTS.c.at)).all()
    if not any(event.after == "trusted" for event in events):
        return None
    first = {event.subject: event.at for event in reversed(events)}  # one that is ejected later was trusted till then
    since = max(*first.values(), *(event.at for event in events if event.after == "trusted"))
    late = [line for line in lines if line["kind"] == "node" and line["heard_at"] > since]
    before = last_per_process(line for line in reversed(late) if line["started_at"] <= since)
    after = last_per_process(late)
    gained: dict[str, float] = defaultdict(float)
    for key, line in after.items():
        for kind, name in (("work", line["role"]), ("proof", "proof")):
            gained[name] += used(line, kind, config.prices, before.get(key))
    return _ratio(gained["validator"] + gained["proof"], gained["worker"])


def _submitters(run: str) -> Any:
    return sa.select(SUBMISSIONS.c.node).where(SUBMISSIONS.c.run == run)


# --- who and how -----------------------------------------------------------------------------------------------------


def _nodes(connection: Connection, config: Config) -> dict[str, Any]:
    cheats = dict(_cheats(config))
    rows = connection.execute(
        sa.select(VERDICTS, NODES.c.name)
        .join(NODES, NODES.c.node == VERDICTS.c.node)
        .where(VERDICTS.c.run == config.run.name, VERDICTS.c.outcome == "eject")
    ).all()
    reasons = {v.node: v.reason for v in views.verdicts(connection, config.run.name) if v.outcome == "eject"}
    ejected = [
        {
            "node": row.node,
            "name": row.name,
            "true_role": cheats.get(row.node, "honest"),
            "reason": reasons[row.node],
            "submissions_until_caught": row.submissions,
        }
        for row in rows
    ]
    seen = connection.execute(sa.select(sa.func.count()).where(NODES.c.role == "worker")).scalar_one()
    return {
        "nodes_seen": seen,
        "nodes_ejected": ejected,
        "honest_ejected": sum(node["true_role"] == "honest" for node in ejected),
    }


def _cheats(config: Config) -> Iterator[tuple[str, str]]:
    """(node, attack) of the adversaries that the swarm started; names are whatever nodes call themselves."""
    for cheat in config.swarm.cheats:
        path = config.folder / "nodes" / cheat.name / "key"
        if path.exists():
            yield Key.load_or_make(path).id, cheat.attack


def _trainer(steps: list[Any]) -> dict[str, Any]:
    metrics = [step.metrics for step in steps]
    waited = sum(m.get("wait_s", 0.0) for m in metrics)
    busy = sum(m.get(part, 0.0) for m in metrics for part in ("tripwire_s", "train_s", "publish_s"))
    return {
        "trainer_idle_fraction": _ratio(waited, waited + busy),
        "staleness_mean": _mean([m["staleness"] for m in metrics if "staleness" in m]),
        "mismatch_kl_mean": _mean([m["mismatch_kl"] for m in metrics if "mismatch_kl" in m]),
    }


def _mean(values: list[float]) -> float | None:
    return round(statistics.fmean(values), 6) if values else None


def _weights(lines: list[Line], steps: list[Any]) -> dict[str, Any]:
    sizes = [line["weights_bytes"] for line in lines if line["kind"] == "step"]
    sent = sum(line["size_bytes"] for line in lines if line["kind"] == "sent")
    pauses = [line["sync_pause_s"] for line in lines if line["kind"] == "node" and line["sync_pause_s"] > 0]
    return {
        "weights_full_bytes": sizes[-1] if sizes else None,
        "weights_sent_bytes_per_step": round(sent / (len(steps) + 1)) if steps else None,
        "sync_pause_s": round(statistics.median(pauses), 4) if pauses else None,
    }
