"""What a long history costs: the commit of a step, and /status, of a run with 10^6 entries in its ledger and more.

Two targets. A commit takes at 10^6 ledger entries at most 1.2 times what it takes at 10^4: the one writer does it, so
all nodes wait meanwhile. `GET status` of 10^6 rollouts takes at most 0.2 s, each look a cold one.

Prints one JSON object as its last line: milliseconds of both at each size of history, by the clock and of CPU time.
Both targets are held against CPU time, for a busy machine lengthens the rest; on an idle one they are nearly the same.
`--quick` measures the same at 10^4 and 10^5 entries, and /status at 10^5 rollouts, where
its growth tells more than its time; the full command is
`python bench/history.py`, which takes some minutes.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import msgspec
import sqlalchemy as sa

from farflung.config import Config
from farflung.coordinator import Coordinator, open_coordinator
from farflung.protocol import seeds
from farflung.protocol.identity import Key, seal
from farflung.protocol.messages import Commit, Manifest
from farflung.rollouts.commit import commit_step
from farflung.store import ledger
from farflung.store import tables as t
from farflung.store.bulk import insert_rows
from farflung.store.db import writing
from farflung.store.sql_connections import open_engine
from farflung.tasks.create_run import local_grants
from farflung.trust.record import NodeRecord
from farflung.weights.manifest import manifest_digest

ROOT = Path(__file__).parents[1]
NODES, SAMPLES, GROUPS, TOKENS = 200, 16, 16, 200
STEP = SAMPLES * GROUPS
"""Rollouts that a step trains on."""
COMMITS, LOOKS, AT_ONCE = 15, 7, 20_000
RATIO, STATUS_S = 1.2, 0.2
QUICK_GROWTH = 2.0
"""Of /status from 5,000 to 100,000 rollouts: 3.3 where every row is counted, 1.2 where counts are kept."""
RUN = "history"
FIGURES = {f"figure_{number}": number / 7 for number in range(20)}
QUICKLY = "PRAGMA synchronous=OFF; PRAGMA cache_size=-1000000"
DecodeBatch = Iterable[dict[str, Any]]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the history")
    return parser.parse_args()


class Spent(NamedTuple):
    """Milliseconds."""

    wall_ms: float
    cpu_ms: float


class Past:
    """Rows as a run leaves them: of `rollouts` that are done with, then COMMITS steps that wait for their commit."""

    def __init__(self, task: str, rollouts: int) -> None:
        self.task, self.steps = task, rollouts // STEP

    def tables(self) -> Iterator[tuple[Any, DecodeBatch]]:
        """Every table with its rows, in the order of their keys."""
        every = range(self.steps + COMMITS)
        yield t.NODES, map(self._node, range(NODES))
        yield t.STEPS, map(self._step, range(self.steps + COMMITS + 1))
        yield t.GROUPS, (self._group(step, place) for step in every for place in range(GROUPS))
        yield t.LEASES, (self._lease(step, place) for step in every for place in range(GROUPS))
        yield t.ROLLOUTS, (row for step in every for row in self._rollouts(step))
        yield t.ENTRIES, (row for step in every for row in self._entries(step))

    def _node(self, number: int) -> dict[str, Any]:
        said = {"role": "worker", "status": "trusted", "engine": "local", "profile": "torch-cpu-fp32", "hardware": "{}"}
        record, now = msgspec.msgpack.encode(NodeRecord()), time.time()
        own = {"node": f"n{number}", "public": b"", "name": f"node-{number}", "record": record}
        return said | own | {"registered_at": 1.0, "seen_at": now}

    def _step(self, step: int) -> dict[str, Any]:
        is_over = step <= self.steps
        row = {"id": f"{RUN}-step-{step}", "run": RUN, "step": step, "claimed_at": 1.0, "seen_groups": GROUPS}
        row |= {"seen_reward": 0.5, "metrics": json.dumps(FIGURES)}
        done = {"status": "committed", "committed_at": 1.0, "manifest_digest": f"{step:064x}", "weights_digest": ""}
        waits = {"status": "open", "committed_at": None, "manifest_digest": None, "weights_digest": None}
        return row | (done if is_over else waits)

    def _group(self, step: int, place: int) -> dict[str, Any]:
        status = "trained" if step < self.steps else "batched"
        row = {"group": f"g{step}-{place}", "run": RUN, "task": self.task, "step": step, "purpose": "train", "free": 0}
        return row | {
            "samples": SAMPLES, "status": status, "opened_at": 1.0, "batch_step": step + 1, "reward": 0.5,
            "is_informative": True,
        }  # fmt: skip

    def _lease(self, step: int, place: int) -> dict[str, Any]:
        row = {"lease": f"l{step}-{place}", "run": RUN, "node": self._owner(step, place), "step": step}
        row |= {"purpose": "train", "status": "submitted", "opened_at": 1.0, "expires_at": 1.0, "document": bytes(500)}
        return row | {"submission": f"s{step}-{place}"}

    def _rollouts(self, step: int) -> Iterator[dict[str, Any]]:
        is_over = step < self.steps
        common = {"run": RUN, "tokens": TOKENS, "position": 0}
        common |= {"status": "trained" if is_over else "batched", "escrow_step": None if is_over else step}
        for number in range(STEP):
            place, sample = divmod(number, SAMPLES)
            own = {"rollout": f"r{step}-{number}", "group": f"g{step}-{place}", "lease": f"l{step}-{place}"}
            own |= {"sample": sample, "node": self._owner(step, place), "submission": f"s{step}-{place}"}
            yield common | own | {"reward": float(sample % 2)}

    def _entries(self, step: int) -> DecodeBatch:
        paid = [
            ledger.Transfer(f"r{step}-{n}", ledger.ISSUED, ledger.escrow(self._owner(step, n // SAMPLES)), TOKENS)
            for n in range(STEP)
        ]
        owners = [self._owner(step, place) for place in range(GROUPS)] if step < self.steps else []
        ripe = [ledger.Transfer(RUN, ledger.escrow(n), ledger.credit(n), TOKENS * SAMPLES) for n in owners]
        return ledger.entries([*paid, *ripe], RUN, 1.0)

    def _owner(self, step: int, place: int) -> str:
        return f"n{(step * GROUPS + place) % NODES}"


def fill(config: Config, past: Past) -> None:
    """Rows as if the founded run had gone on for long; nothing but this process needs them if the power fails."""
    engine = open_engine(config.database_url)
    sa.event.listen(engine, "connect", lambda raw, _: raw.executescript(QUICKLY))
    with engine.connect() as connection, writing(connection):
        for table, rows in past.tables():
            rows = iter(rows)
            while some := list(islice(rows, AT_ONCE)):
                insert_rows(connection, table, some)
    engine.dispose()


async def commits(coordinator: Coordinator, past: Past) -> list[Spent]:
    """What each commit takes of the one writer."""
    ctx, key, found = coordinator.ctx, Key(bytes(32)), []
    for step in range(past.steps + 1, past.steps + 1 + COMMITS):
        latest = await ctx.database.read(ctx.run_ctx.latest)
        manifest = Manifest(
            run=RUN, step=step, base_step=step, parent=latest.manifest, digest=f"{step:064x}", tensors=[], shards=[],
            secret_commitment=seeds.commitment(ctx.run_ctx.step_secret(step)).hex(), made_at=1.0, expires_at=4e9,
        )  # fmt: skip
        commit = Commit(manifest=seal(key, "manifest", manifest), metrics=FIGURES, checkpoint="")
        digest = manifest_digest(commit.manifest)

        def change(connection: Any, digest=digest, manifest=manifest, commit=commit) -> Spent:
            since, worked = time.perf_counter(), time.thread_time()
            commit_step(connection, ctx.run_ctx, digest, manifest, commit, time.time())
            return Spent((time.perf_counter() - since) * 1e3, (time.thread_time() - worked) * 1e3)

        found.append(await ctx.database.write(change))
    return found


async def looks(coordinator: Coordinator) -> list[Spent]:
    """What each cold `GET status` takes."""
    found, transport = [], httpx2.ASGITransport(app=coordinator.app())
    async with httpx2.AsyncClient(transport=transport, base_url="http://bench") as client:
        for _ in range(LOOKS):
            coordinator.ctx.glance.forget()
            since, worked = time.perf_counter(), time.process_time()
            answer = await client.get(f"/v1/runs/{RUN}/status")
            found.append(Spent((time.perf_counter() - since) * 1e3, (time.process_time() - worked) * 1e3))
            answer.raise_for_status()
    return found


async def measure(rollouts: int) -> dict[str, float]:
    """Both figures of one history."""
    with tempfile.TemporaryDirectory(prefix="farflung-history-") as folder:
        tree = {
            "run": {"name": RUN, "dir": folder, "steps": 10**6},
            "model": {"path": str(ROOT / "examples" / "base")},
            "env": {"name": "sums", "train_tasks": 64, "eval_tasks": 0},
            "eval": {"tasks": 0},
            "generate": {"max_new_tokens": 32},
        }
        config = local_grants(Config.model_validate(tree))
        config.folder.mkdir(parents=True, exist_ok=True)
        coordinator = await open_coordinator(config)
        past, since = Past(coordinator.ctx.run_ctx.tasks[0][0], rollouts), time.monotonic()
        coordinator.ctx.database.close()
        fill(config, past)
        print(f"prepared {rollouts} rollouts in {time.monotonic() - since:.0f} s", file=sys.stderr)
        coordinator = await open_coordinator(config)  # as after a restart
        looked, committed = await looks(coordinator), await commits(coordinator, past)
        coordinator.ctx.database.close()
    return told("status", looked) | told("commit", committed) | {"status_first_ms": round(looked[0].wall_ms, 1)}


def told(name: str, spent: list[Spent]) -> dict[str, float]:
    """Median and maximum by the clock, and the median of CPU time, which a busy machine does not lengthen."""
    walls, works = [one.wall_ms for one in spent], [one.cpu_ms for one in spent]
    found = {"ms": statistics.median(walls), "max_ms": max(walls), "cpu_ms": statistics.median(works)}
    return {f"{name}_{unit}": round(value, 1) for unit, value in found.items()}


def main() -> None:
    """Measure histories of several sizes, the smallest first."""
    is_quick = parse().quick
    scale = 10 if is_quick else 1
    sizes = (5_000, 500_000 // scale, 1_000_000 // scale)
    found = {size: asyncio.run(measure(size)) for size in sizes}
    ratio = found[sizes[1]]["commit_cpu_ms"] / found[sizes[0]]["commit_cpu_ms"]
    status_s = found[sizes[2]]["status_cpu_ms"] / 1e3
    growth = found[sizes[2]]["status_cpu_ms"] / found[sizes[0]]["status_cpu_ms"]
    result = {
        "by_rollouts": found,
        "entries": [2 * size for size in sizes],
        "commit_ratio": round(ratio, 2),
        "commit_ratio_limit": RATIO,
        "status_cpu_s": round(status_s, 3),
        "status_limit_s": STATUS_S,
        "status_growth": round(growth, 2),
        "is_within": ratio <= RATIO and status_s <= STATUS_S and (growth <= QUICK_GROWTH or not is_quick),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
