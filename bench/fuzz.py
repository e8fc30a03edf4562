"""Whatever bytes come: a million inputs to the decoders, then whole signed requests to a real coordinator.

    python bench/fuzz.py [--quick] [--inputs 1000000] [--requests 50000] [--seed 0]

Inputs are valid ones with bytes or values changed, or random. A decoder *crashes* if it raises anything but the errors
that it documents. Requests are changed first and signed by real keys then, so that the signature stops none of them;
afterwards the run's invariants must hold. Growth is of resident memory, from a tenth of the way to the end. The last
line is JSON; the exit is 1 if anything broke.
`--quick` does the same with 20,000 inputs and 1,000 requests; the full command is `python bench/fuzz.py`.
"""

import argparse
import asyncio
import json
import math
import re
import shutil
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from coordinator import Coordinators, configuration
from load.clients import coordinator_id, publish_nothing
from load.decoders import Decoder, crashed, decoders
from load.fuzz_clients import FuzzClients
from load.mutate import Chance

from farflung.config import Config
from farflung.ops.invariants import violations
from farflung.store.sql_connections import open_engine


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20,000 inputs and 1,000 requests")
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


# --- decoders --------------------------------------------------------------------------------------------------------


def feed(inputs: int, seed: int, folder: Path) -> dict[str, Any]:
    """Shares of the inputs to every decoder, in turns, so that growth shows whichever it is of."""
    found = decoders(folder)
    chances = [Chance(f"{seed} {one.name}") for one in found]
    total, crashes, counts = sum(one.weight for one in found), Counter[str](), Counter[str]()
    process, rss_start = psutil.Process(), 0
    with warnings.catch_warnings(action="error"):
        for part in range(10):
            for one, chance in zip(found, chances, strict=True):
                share = math.ceil(inputs * one.weight / total * (part + 1) / 10) - counts[one.name]
                counts[one.name] += share
                crashes.update(_tried(one, chance, share))
            rss_start = rss_start or process.memory_info().rss
    growth = (process.memory_info().rss - rss_start) / 1e6
    return {
        "inputs": counts.total(),
        "decoders": len(found),
        "crashes": crashes.total(),
        "crashed": dict(crashes.most_common(9)),
        "decoders_growth_mb": round(growth, 1),
    }


def _tried(decoder: Decoder, chance: Chance, count: int) -> list[str]:
    return [said for _ in range(count) if (said := crashed(decoder, chance))]


# --- requests --------------------------------------------------------------------------------------------------------


async def besiege(config: Config, coordinators: Coordinators, requests: int, seed: int) -> dict[str, Any]:
    """Send them all, and see what is left."""
    address = coordinators.addresses[0]
    url = "http://{}:{}".format(*address)
    clients = FuzzClients(config, address, await coordinator_id(url), seed)
    await clients.arrive()
    await publish_nothing(url, "load", clients.keys["trainer"])
    await clients.flood(requests // 10)
    rss_start, _ = coordinators.measure()
    await clients.flood(requests - requests // 10)
    rss_end, _ = coordinators.measure()
    is_alive = all(process.poll() is None for process in coordinators.running)
    log = coordinators.paths[0].with_suffix(".log").read_text()
    return {
        "requests": clients.statuses.total(),
        "server_errors": len(clients.broken),
        "broke": clients.broken[:9],
        "tracebacks": log.count("Traceback"),
        "raised": dict(Counter(re.findall(r"(?m)^[\w.]+(?:Error|Exception): .{0,120}", log)).most_common(9)),
        "is_alive": is_alive,
        "statuses": dict(sorted(clients.statuses.items())),
        "rss_mb_start": round(rss_start, 1),
        "rss_mb_end": round(rss_end, 1),
    }


def hold(config: Config) -> list[str]:
    """What of the invariants does not hold any more."""
    engine = open_engine(config.database_url)
    with engine.connect() as connection:
        found = violations(connection, config)
    engine.dispose()
    return found


def main() -> None:
    """Decoders first, then the coordinator."""
    args = parse()
    if args.quick:
        args.inputs, args.requests = 20_000, 1_000
    folder = Path(tempfile.mkdtemp(prefix="farflung-fuzz-"))
    try:
        result: dict[str, Any] = {"seed": args.seed} | feed(args.inputs, args.seed, folder)
        args.rate, args.seconds, args.processes, args.replicas, args.profile = 50.0, args.requests / 100, 1, 1, False
        config = configuration(folder, args, "")
        coordinators = Coordinators(config, args)
        try:
            result |= asyncio.run(besiege(config, coordinators, args.requests, args.seed))
        finally:
            coordinators.stop()
        result["invariant_violations"] = hold(config)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result))
    bad = result["crashes"] or result["server_errors"] or result["tracebacks"] or result["invariant_violations"]
    raise SystemExit(1 if bad or not result["is_alive"] else 0)


if __name__ == "__main__":
    main()
