"""`farflung redteam`: run adversaries against real runs, and say for each whether it was caught, where, and its gain.

Everything comes from the run's database, from what each adversary wrote down (`redteam/adversary.py`), and from scoring
its text and that of the seeds on the same prompts. Nothing about an outcome is known beforehand.
"""

import asyncio
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from rich.table import Table
from sqlalchemy import Connection

from farflung.config import Cheat, Config
from farflung.envs.load import load_env
from farflung.launch.profile_fit import calibrated
from farflung.launch.swarm import Swarm, prepare
from farflung.launch.terminal import Terminal
from farflung.protocol.errors import ConfigError
from farflung.protocol.identity import Key, Signed, unseal
from farflung.protocol.messages import Verdict
from farflung.redteam import GALLERY
from farflung.redteam.adversary import LEDGER
from farflung.rollouts.archive import text_of
from farflung.store import ledger
from farflung.store.metrics import Metrics
from farflung.store.sql_connections import open_engine
from farflung.store.tables import ENTRIES, EVENTS, GROUPS, NODES, ROLLOUTS, TASKS, VERDICTS
from farflung.tasks.create_run import Model
from farflung.trust import evidence
from farflung.trust.record import NodeRecord

AT_ONCE = 7
"""Adversaries in one swarm."""
IDENTITY = {"bad-signature", "replayed", "clock-skew", "forbidden", "not-found"}
POSSESSION = {"wrong-weights"}
WIDTH = 160
"""Of the table where it goes to a file."""
Row = dict[str, Any]
Pay = tuple[int, float]
"""Tokens that a node was paid and still has, and the CPU-seconds that it generated for."""
LEAST_CPU_S = 1e-6
"""The least CPU time that generation is counted to take, so that free work has a gain."""


def run_evaluation(config: Config, attacks: Sequence[str], at_once: int = AT_ONCE, times: int = 1) -> list[Row]:
    """Every attack against real runs, so many times, some of them at once; writes redteam.json with a row for each.

    Raises ConfigError for an unknown one.
    """
    unknown = sorted(set(attacks) - set(GALLERY))
    if unknown:
        raise ConfigError(f"there is no attack {unknown[0]!r}; the gallery has {', '.join(GALLERY)}")
    config = _fitted(config)
    rows: list[Row] = []
    honest: list[list[float]] = []
    cheats = [
        Cheat(name=f"{attack}-{time}" if times > 1 else attack, attack=attack)
        for attack in attacks
        for time in range(1, times + 1)
    ]
    for number, start in enumerate(range(0, len(cheats), at_once), 1):
        some = tuple(cheats[start : start + at_once])
        found, pay = _one_run(_with(config, some, f"{config.run.name}-{number}"))
        rows, honest = rows + found, [*honest, pay]
    error = pay_error(honest)
    for row in rows:
        row["gain_error"] = error if row["aim"] == "pay" else row["gain_error"]
        row["outcome"] = _outcome(row)
    config.run.dir.mkdir(parents=True, exist_ok=True)
    (config.run.dir / f"{config.run.name}-redteam.json").write_text(json.dumps(rows, indent=2) + "\n")
    return rows


def _fitted(config: Config) -> Config:
    """The configuration with profiles that fit its runs, made once for all of them."""
    own = _with(config, (), f"{config.run.name}-profiles")
    prepare(own, fresh=True)
    fitted = asyncio.run(calibrated(own, lambda text: sys.stderr.write(f"{text}\n")))
    return config.model_copy(update={"model": fitted.model})


def _with(config: Config, cheats: tuple[Cheat, ...], name: str) -> Config:
    swarm = config.swarm.model_copy(update={"cheats": cheats})
    return config.model_copy(update={"swarm": swarm, "run": config.run.model_copy(update={"name": name})})


def pay_error(honest: Sequence[Sequence[float]]) -> float:
    """Standard deviation of one more honest worker's pay about the others' mean, in shares of that, over swarms."""
    of_each = [[pay / statistics.fmean(swarm) for pay in swarm] for swarm in honest if sum(swarm)]
    squares = sum((pay - 1) ** 2 for swarm in of_each for pay in swarm)
    freedom = sum(len(swarm) - 1 for swarm in of_each)
    least = min((len(swarm) for swarm in of_each), default=1)
    return math.sqrt(squares / freedom * (1 + 1 / least)) if freedom else 0.0


def _one_run(config: Config) -> tuple[list[Row], list[float]]:
    """Its adversaries, and the pay of its honest workers per CPU-second."""
    prepare(config, fresh=True)
    swarm = Swarm(config, is_plain=True, concludes=False)
    asyncio.run(swarm.run())
    engine = open_engine(config.database_url)
    with engine.connect() as connection:
        honest = _honest(connection, config)
        rows = [_row(connection, config, cheat, honest) for cheat in config.swarm.cheats]
    engine.dispose()
    return rows, [tokens / cpu_s for tokens, cpu_s in honest]


# --- one attack ------------------------------------------------------------------------------------------------------


def _row(connection: Connection, config: Config, cheat: Cheat, honest: Sequence[Pay]) -> Row:
    folder = config.folder / "nodes" / cheat.name
    lines = [json.loads(line) for line in _text(folder / LEDGER).splitlines()]
    node = Key.load_or_make(folder / "key").id
    record, verdict = _record(connection, node), _verdict(connection, node)
    gains = _gains(connection, config, lines)
    cpu_s = sum(line["cpu_s"] for line in lines)
    kept = _balance(connection, node)
    gains["pay"] = _more_pay(_pay_of(connection, [line for line in lines if _is_cheating(line)] or lines), honest)
    gains["poison"] = float(_poisoned(connection, lines))
    aim = GALLERY[cheat.attack]().aim
    layer = _layer(connection, node, lines, verdict)
    return {
        "attack": cheat.attack,
        "layer": layer,
        "submissions": verdict[1] if verdict else len(lines),
        "cheating_submissions": _cheating(lines[: verdict[1]] if verdict else lines),
        "submissions_since_first": _since_first(lines[: verdict[1]] if verdict else lines),
        "audited_tokens": record.audited_tokens,
        "statistic": verdict[0].statistic if verdict else record.statistic,
        "threshold": verdict[0].threshold if verdict else evidence.limit(config.trust.false_ejection_probability),
        "verdict": verdict[0].outcome if verdict else "",
        "status": record.status,
        "bad_submissions": record.bad_submissions,
        "aim": aim,
        "gain": gains[aim],
        "gain_error": gains.get(f"{aim}_error", 0.0),
        "pay_in_time": _more_in_time(kept, honest),
        "tokens_kept": kept,
        "cpu_s": round(cpu_s, 3),
        "poisoned_tokens_trained": int(gains["poison"]),
        "reward_shift": gains["reward"],
        "length_shift": gains["length"],
        "answers": dict(sorted(_answers(lines).items())),
    }


def _outcome(row: Row) -> str:
    """`caught` if ejected, quarantined, void or turned away; else `worthless` or `not told apart`, as measured."""
    stopped = ("sanity", "identity", "possession", "replay")
    is_void = row["layer"] == "tripwire" and row["bad_submissions"] > 0
    if row["status"] in ("ejected", "quarantined") or row["layer"] in stopped or is_void:
        return "caught"
    return "worthless" if row["gain"] <= 2 * row["gain_error"] else "not told apart"


def _layer(connection: Connection, node: str, lines: Sequence[Row], verdict: tuple[Verdict, int] | None) -> str:
    """The layer that stopped it first, by what was written down; empty for none."""
    refused = [line["answer"] for line in lines if line["answer"] not in ("taken", "returned", "lease-gone", "ejected")]
    if lines and len(refused) == len(lines):
        if set(refused) <= POSSESSION:
            return "possession"
        return "identity" if set(refused) <= IDENTITY else "sanity"
    if _tripped(connection, node):
        return "tripwire"
    if verdict:
        return "replay"
    return "scheduling" if any(line["answer"] == "returned" for line in lines) else ""


def _cheating(lines: Sequence[Row]) -> int:
    """Submissions in which something was not what the seeds give: with a sure policy a cheat often says the same."""
    return sum(map(_is_cheating, lines))


def _is_cheating(line: Row) -> bool:
    return any(sent != seeded for _, sent, seeded in line["rollouts"])


def _since_first(lines: Sequence[Row]) -> int:
    """Submissions from the first that was not what the seeds give on."""
    return next((len(lines) - i for i, line in enumerate(lines) if _is_cheating(line)), 0)


def _tripped(connection: Connection, node: str) -> int:
    """Rollouts of this node that the trainer asked to have replayed before the first verdict."""
    left = sa.and_(EVENTS.c.noun == "rollout", EVENTS.c.before == "batched", EVENTS.c.after == "held")
    mine = sa.select(sa.func.count()).join(ROLLOUTS, ROLLOUTS.c.rollout == EVENTS.c.subject).where(left)
    return connection.execute(mine.where(ROLLOUTS.c.node == node)).scalar_one()


def _answers(lines: Sequence[Row]) -> dict[str, int]:
    found = [line["answer"] for line in lines]
    return {answer: found.count(answer) for answer in set(found)}


def _record(connection: Connection, node: str) -> NodeRecord:
    row = connection.execute(sa.select(NODES.c.record).where(NODES.c.node == node)).scalar()
    return msgspec.msgpack.decode(row, type=NodeRecord) if row else NodeRecord()


def _verdict(connection: Connection, node: str) -> tuple[Verdict, int] | None:
    """The verdict that says most: ejection before the first other one; and the submissions until then."""
    rows = connection.execute(sa.select(VERDICTS).where(VERDICTS.c.node == node).order_by(VERDICTS.c.id)).all()
    rows = [row for row in rows if row.outcome != "release"]
    if not rows:
        return None
    row = next((row for row in rows if row.outcome == "eject"), rows[0])
    return unseal(msgspec.msgpack.decode(row.document, type=Signed), "verdict", Verdict), row.submissions


# --- gains -----------------------------------------------------------------------------------------------------------


def _more_pay(mine: Pay, honest: Sequence[Pay]) -> float:
    """By how much more of the mean honest worker's pay per CPU-second of generation it kept; -1 is nothing at all."""
    per_cpu_s = [tokens / cpu_s for tokens, cpu_s in honest]
    return mine[0] / max(mine[1], LEAST_CPU_S) / statistics.fmean(per_cpu_s) - 1 if any(per_cpu_s) else 0.0


def _more_in_time(kept: int, honest: Sequence[Pay]) -> float:
    """By how much more of the mean honest worker's pay it kept in the same time, whatever either spent."""
    pay = [tokens for tokens, _ in honest]
    return kept / statistics.fmean(pay) - 1 if any(pay) else 0.0


def _pay_of(connection: Connection, lines: Sequence[Row]) -> Pay:
    """The pay for these submissions that was not burned, and the CPU-seconds that they took."""
    rollouts = [rollout for line in lines for rollout, _, _ in line["rollouts"]]
    moved = sa.select(sa.func.coalesce(sa.func.sum(ENTRIES.c.tokens), 0)).where(
        ENTRIES.c.cause.in_(rollouts), ENTRIES.c.account.in_((ledger.ISSUED, ledger.BURNED))
    )
    return -int(connection.execute(moved).scalar_one()), sum(line["cpu_s"] for line in lines)


def _honest(connection: Connection, config: Config) -> list[Pay]:
    """The pay that each honest worker of the same run kept, and the CPU-seconds that it generated for."""
    names = {cheat.name for cheat in config.swarm.cheats}
    rows = connection.execute(sa.select(NODES.c.node, NODES.c.name).where(NODES.c.role == "worker")).all()
    honest = {row.node for row in rows if row.name not in names}
    lines = Metrics(config.folder / "metrics.jsonl").lines()
    cpu_s = {line["node"]: line["work_cpu_s"] for line in lines if line["kind"] == "node" and line["node"] in honest}
    return [(_balance(connection, node), taken_s) for node, taken_s in cpu_s.items() if taken_s]


def _balance(connection: Connection, node: str) -> int:
    """Tokens that a node was paid and still has."""
    return sum(ledger.balance(connection, account(node)) for account in (ledger.credit, ledger.escrow))


def _gains(connection: Connection, config: Config, lines: Sequence[Row]) -> dict[str, float]:
    """Shift of mean reward and length against what the seeds give on the same prompts, with standard errors."""
    env, tokenizer = load_env(config.env.name, config.env.args), Model(config.model.path).tokenizer
    tasks = _tasks(connection, [rollout for line in lines for rollout, _, _ in line["rollouts"]])
    rewards: list[float] = []
    lengths: list[float] = []
    for line in lines:
        for rollout, sent, seeded in line["rollouts"]:
            lengths.append(len(sent) - len(seeded))
            texts = [text_of(tokenizer, ids, config.generate.stop) for ids in (sent, seeded)]
            worth = [env.score(tasks[rollout], text).reward for text in texts]
            rewards.append(worth[0] - worth[1])
    return {**_mean("reward", rewards), **_mean("length", lengths)}


def _mean(name: str, values: Sequence[float]) -> dict[str, float]:
    if len(values) < 2:
        return {name: 0.0, f"{name}_error": 0.0}
    return {name: statistics.fmean(values), f"{name}_error": statistics.stdev(values) / math.sqrt(len(values))}


def _tasks(connection: Connection, rollouts: Sequence[str]) -> dict[str, Any]:
    query = (
        sa.select(ROLLOUTS.c.rollout, TASKS.c.payload)
        .join(GROUPS, GROUPS.c.group == ROLLOUTS.c.group)
        .join(TASKS, TASKS.c.task == GROUPS.c.task)
        .where(ROLLOUTS.c.rollout.in_(rollouts))
    )
    return {row.rollout: msgspec.json.decode(row.payload) for row in connection.execute(query)}


def _poisoned(connection: Connection, lines: Sequence[Row]) -> int:
    """Tokens of rollouts that were trained on and are not what their seeds give."""
    wrong = {
        r: len(sent)
        for line in lines
        if line["answer"] == "taken"
        for r, sent, seeded in line["rollouts"]
        if sent != seeded
    }
    query = sa.select(EVENTS.c.subject).where(EVENTS.c.subject.in_(wrong), EVENTS.c.after == "trained")
    return sum(wrong[rollout] for rollout in set(connection.execute(query).scalars()))


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def show(rows: Sequence[Row]) -> None:
    """The table; of an attack that was run several times, medians."""
    table = Table()
    for name in (
        "attack",
        "outcome",
        "layer",
        "subs",
        "from first",
        "tokens",
        "statistic",
        "threshold",
        "gain",
        "poisoned",
    ):
        table.add_column(name, overflow="fold")
    for attack in dict.fromkeys(row["attack"] for row in rows):
        table.add_row(*_table_row([row for row in rows if row["attack"] == attack]))
    Terminal(width=None if sys.stdout.isatty() else WIDTH).print(table)


def _table_row(rows: Sequence[Row]) -> list[str]:
    """One attack's line."""

    def text_of_column(name: str) -> str:
        values = {row[name]: None for row in rows}
        return ", ".join(f"{v} {sum(row[name] == v for row in rows)}" if len(values) > 1 else str(v) for v in values)

    def middle(name: str) -> float:
        return statistics.median(row[name] for row in rows)

    attack = f"{rows[0]['attack']} ×{len(rows)}" if len(rows) > 1 else rows[0]["attack"]
    counts = [f"{middle(name):g}" for name in ("submissions", "submissions_since_first", "audited_tokens")]
    figures = [f"{middle('statistic'):.3g}", f"{middle('threshold'):.3g}", f"{middle('gain'):+.3g} {rows[0]['aim']}"]
    poisoned = str(sum(row["poisoned_tokens_trained"] for row in rows))
    return [attack, text_of_column("outcome"), text_of_column("layer"), *counts, *figures, poisoned]
