"""What nodes wait for while strangers read: a run with 300,000 rollouts, 16 readers of /status, /metrics and /ledger.

Prints one JSON object as its last line: milliseconds of `GET latest` and of heartbeats, without readers and beside
them, and how many requests the readers got answered. The coordinator is a process of its own.
`--quick` measures the same at a tenth of the rollouts for a third of the time; the full command is
`python bench/readers.py`.
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import msgspec

from farflung.config import Config, save
from farflung.coordinator import open_coordinator
from farflung.net.client import Client
from farflung.net.session import Index
from farflung.protocol import messages as m
from farflung.protocol.identity import Key
from farflung.store import tables as t
from farflung.store.db import Database
from farflung.tasks.create_run import local_grants
from farflung.trust.record import NodeRecord

ROOT = Path(__file__).parents[1]
READERS, NODES, SAMPLES, AT_ONCE = 16, 500, 16, 20_000
SERVE = """
import asyncio, sys
from pathlib import Path
from farflung.config import load
from farflung.coordinator import serve
asyncio.run(serve(load(Path(sys.argv[1]))))
"""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rollouts", type=int, default=300_000)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of the two measurements")
    return parser.parse_args()


async def prepare(config: Config, rollouts: int) -> None:
    """A run that was founded, and rows as if it had gone on for long."""
    coordinator = await open_coordinator(config)
    database = coordinator.ctx.database
    task, run = coordinator.ctx.run_ctx.tasks[0][0], config.run.name
    await coordinator.ctx.database.write(lambda c: c.execute(t.RUNS.update().values(status="running")))
    blank = msgspec.msgpack.encode(NodeRecord())
    nodes = [
        {"node": f"n{i}", "public": b"", "name": f"node-{i}", "role": "worker", "status": "trusted", "engine": "local",
         "profile": "torch-cpu-fp32", "hardware": "{}", "record": blank, "registered_at": 1.0, "seen_at": time.time()}
        for i in range(NODES)
    ]  # fmt: skip
    groups = [
        {"group": f"g{i}", "run": run, "task": task, "step": 0, "purpose": "train", "samples": SAMPLES, "free": 0,
         "status": "trained", "opened_at": 1.0, "batch_step": 1, "reward": 0.5, "is_informative": True}
        for i in range(rollouts // SAMPLES)
    ]  # fmt: skip
    leases = [
        {"lease": f"l{i}", "run": run, "node": f"n{i % NODES}", "step": 0, "purpose": "train", "status": "submitted",
         "opened_at": 1.0, "expires_at": 1.0, "document": bytes(500), "submission": f"s{i}"}
        for i in range(rollouts // SAMPLES)
    ]  # fmt: skip
    made = [
        {"rollout": f"r{i}", "run": run, "group": f"g{i // SAMPLES}", "sample": i % SAMPLES,
         "lease": f"l{i // SAMPLES}", "node": f"n{i // SAMPLES % NODES}",
         "status": "trained", "submission": f"s{i // SAMPLES}", "position": 0,
         "tokens": 200, "reward": float(i % 2)}
        for i in range(rollouts)
    ]  # fmt: skip
    entries = [
        {"run": run, "at": 1.0, "cause": f"r{i}", "account": account, "tokens": sign * 200}
        for i in range(rollouts)
        for account, sign in (("issued", -1), (f"escrow:n{i // SAMPLES % NODES}", 1))
    ]
    for table, rows in ((t.NODES, nodes), (t.GROUPS, groups), (t.LEASES, leases), (t.ROLLOUTS, made),
                        (t.ENTRIES, entries)):  # fmt: skip
        await fill(database, table, rows)
    database.close()


async def fill(database: Database, table: Any, rows: list[dict[str, Any]]) -> None:
    """Many rows, some at a time."""
    for start in range(0, len(rows), AT_ONCE):
        part = rows[start : start + AT_ONCE]
        await database.write(lambda c, part=part: c.execute(table.insert(), part))


async def timed(act: Callable[[], Awaitable[Any]], seconds: float) -> list[float]:
    """Milliseconds of each of many calls, one after the other with a short pause."""
    found, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        since = time.perf_counter()
        await act()
        found.append((time.perf_counter() - since) * 1e3)
        await asyncio.sleep(0.05)
    return found


def told(spent: list[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum."""
    ordered = sorted(spent)
    return {
        "median_ms": round(statistics.median(ordered), 1),
        "p99_ms": round(ordered[int(0.99 * (len(ordered) - 1))], 1),
        "max_ms": round(ordered[-1], 1),
        "count": len(ordered),
    }


def read_all(url: str, paths: list[str], counts: Any) -> None:
    """All readers, in a process of their own, for ever."""

    async def together() -> None:
        await asyncio.gather(*(read(url, paths, number, counts) for number in range(READERS)))

    asyncio.run(together())


async def read(url: str, paths: list[str], number: int, counts: Any) -> None:
    """One reader, for ever; `counts` are answers and refusals."""
    async with httpx2.AsyncClient(base_url=url, timeout=120) as client:
        while True:
            answer = await client.get(paths[number % len(paths)])
            counts[answer.status_code >= 400] += 1


async def measure(url: str, run: str, seconds: float) -> dict[str, Any]:
    """Without readers, then beside them."""
    path, key = f"/v1/runs/{run}", Key(bytes(32))
    async with httpx2.AsyncClient(base_url=url, timeout=120) as plain:
        tag = Index(**(await plain.get("/v1")).json()).coordinator
        node = Client(url, key, tag, patience_s=120.0)
        await node.post("/v1/nodes", m.Register(version=m.VERSION), m.Welcome)

        async def both() -> tuple[dict[str, float], dict[str, float]]:
            beat = m.Heartbeat(cpu_s=0.0, started_at=0.0)
            found = await asyncio.gather(
                timed(lambda: plain.get(f"{path}/latest"), seconds),
                timed(lambda: node.post(f"{path}/heartbeat", beat, m.HeartbeatReply), seconds),
            )
            return told(found[0]), told(found[1])

        latest, beats = await both()
        counts = multiprocessing.get_context("spawn").Array("l", 2)
        paths = [f"{path}/status", "/metrics", "/ledger", f"{path}/status"]
        readers = multiprocessing.get_context("spawn").Process(target=read_all, args=(url, paths, counts), daemon=True)
        readers.start()
        await asyncio.sleep(3.0)
        latest_beside, beats_beside = await both()
        readers.kill()
        await node.close()
    return {
        "latest": latest,
        "heartbeat": beats,
        "latest_beside_readers": latest_beside,
        "heartbeat_beside_readers": beats_beside,
        "answered": counts[0],
        "refused": counts[1],
    }


def main() -> None:
    """Prepare, serve, measure."""
    args = parse()
    rollouts, seconds = (args.rollouts // 10, args.seconds / 3) if args.quick else (args.rollouts, args.seconds)
    with tempfile.TemporaryDirectory(prefix="farflung-readers-") as folder:
        tree = {
            "run": {"name": "readers", "dir": folder, "steps": 10},
            "model": {"path": str(ROOT / "examples" / "base")},
            "env": {"name": "sums", "train_tasks": 64, "eval_tasks": 0},
            "eval": {"tasks": 0},
            "generate": {"max_new_tokens": 32},
        }
        config = local_grants(Config.model_validate(tree))
        config.folder.mkdir(parents=True, exist_ok=True)
        since = time.monotonic()
        asyncio.run(prepare(config, rollouts))
        print(f"prepared {rollouts} rollouts in {time.monotonic() - since:.0f} s", file=sys.stderr)
        save(config, Path(folder) / "config.json")
        command = [sys.executable, "-c", SERVE, str(Path(folder) / "config.json")]
        with subprocess.Popen(command) as server:
            try:
                address = config.folder / "coordinator.url"
                while not address.exists():
                    time.sleep(0.1)
                found = asyncio.run(measure(address.read_text().strip(), config.run.name, seconds))
            finally:
                server.terminate()
    print(json.dumps({"rollouts": rollouts, "readers": READERS, **found}))


if __name__ == "__main__":
    main()
