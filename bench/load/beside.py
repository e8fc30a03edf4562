"""An engine beside its own benchmark: a server's, and what it makes alone beside its pace under a coordinator."""

import asyncio
import contextlib
import json
import subprocess
import tempfile
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from coordinator import Coordinators, trust_all

from farflung.config import Config, WorkerSection
from farflung.engine.base import Completion, Engine, Request
from farflung.engine.vllm_process import ServerSize, arguments, environment
from farflung.net.client import Client
from farflung.net.session import Session
from farflung.protocol.identity import Key
from farflung.protocol.messages import Commit, Done
from farflung.rollouts.batch import claim
from farflung.tasks.create_run import Model, local_grants
from farflung.trust.evidence import to_json
from farflung.trust.profiles import load_profile
from farflung.weights.publish import Publisher
from farflung.worker import Worker
from load.clients import coordinator_id

OF_A_SERVER = {"--host", "--port", "--logits-processors", "--load-format"}
THROUGHPUT = """
from vllm.benchmarks.throughput import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""`vllm bench throughput` as its own program; the build for CPUs does not find its version by its command."""
RUN, LIMIT_S = "beside", 1800.0


class Lengths(NamedTuple):
    """Of a round of equal requests."""

    count: int
    prompt: int
    new: int


def vllm_throughput(home: Path, model: Path, size: ServerSize, lengths: Lengths) -> float:
    """Tokens made in a second by `vllm bench throughput`, its own process, with the settings of a managed server."""
    flags = arguments(model, 0, size)[2:]
    flags.remove("--tokens-only")
    pairs = [flags[0], *(x for k in range(1, len(flags), 2) if flags[k] not in OF_A_SERVER for x in flags[k : k + 2])]
    asked = {"--dataset-name": "random", "--random-input-len": lengths.prompt, "--random-output-len": lengths.new,
             "--num-prompts": lengths.count, "--num-warmups": 8}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        options = [str(x) for pair in asked.items() for x in pair]
        command = [str(home / "bin" / "python"), "-c", THROUGHPUT, *pairs, *options]
        command += ["--disable-detokenize", "--output-json", str(path)]
        ended = subprocess.run(
            command, env=environment(size), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if ended.returncode:
            raise RuntimeError(f"vllm bench throughput ended with {ended.returncode}: {ended.stdout[-2000:]}")
        found = json.loads(path.read_text())
    return lengths.count * lengths.new / found["elapsed_time"]


# --- under a coordinator ---------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One lease as its engine saw it."""

    requests: Sequence[Request]
    began: float
    ended: float
    tokens: int


@dataclass
class Recorder:
    """An engine that writes down what it is asked for, and else is the true one."""

    truth: Engine
    calls: list[Call] = field(default_factory=list[Call])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.truth, name)

    def generate(
        self, requests: Sequence[Request], should_stop: Callable[[], bool] | None = None
    ) -> Sequence[Completion | None]:
        """What the true one gives; what was stopped does not count."""
        began = time.monotonic()
        found = self.truth.generate(requests, should_stop)
        done = [one for one in found if one is not None]
        if len(done) == len(found):
            self.calls.append(Call(requests, began, time.monotonic(), sum(len(one.ids) for one in done)))
        return found


class Pace(NamedTuple):
    """Tokens a second of the same requests."""

    working: float
    """Under a coordinator, from the first request of the first lease to the last token of the last."""
    generating: float
    """The same without what lies between leases; of a server, whose leases overlap, both are one."""
    alone: float
    """By the same engine, lease after lease, with nobody else."""


def configuration(folder: Path, model: Path, settings: WorkerSection, new: int) -> Config:
    """A run that never lacks work, nor waits for a validator."""
    tree = {
        "run": {"name": RUN, "dir": str(folder)},
        "model": {"path": str(model), "profile": _pretended(folder, model, settings.engine, new)},
        "env": {"name": "sums", "train_tasks": 4096, "eval_tasks": 0},
        "generate": {"samples": 8, "max_new_tokens": new},
        "learn": {"groups": 16},
        "lease": {"rollouts": settings.slots, "ahead": 1e4},
        "trust": {"canaries": 0, "self_test": 0, "probation_waiting": 10_000},
        "eval": {"tasks": 0},
    }
    config = Config.model_validate(tree)
    config.folder.mkdir(parents=True)
    return local_grants(config)


def _pretended(folder: Path, model: Path, engine: str, new: int) -> str:
    """A profile that lets an engine work with this model in bfloat16; nobody judges by it here."""
    own = load_profile("torch-cpu-bf16")
    assert own.scope is not None
    scope = msgspec.structs.replace(own.scope, model=Model(str(model)).digest, tokens=new)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "profile.json"
    path.write_bytes(to_json(msgspec.structs.replace(own, name=f"{engine}-beside", engine=engine, scope=scope)))
    return str(path)


@contextlib.asynccontextmanager
async def coordinator_of(config: Config, weights: dict[str, Any]) -> AsyncIterator[str]:
    """The URL of a coordinator, a process of its own, whose first step has these weights."""
    processes = Coordinators(config, Namespace(replicas=1, processes=1, profile=False))
    try:
        url = "http://{}:{}".format(*processes.addresses[0])
        await coordinator_id(url)
        key = Key.load_or_make(config.folder / "keys" / "trainer")
        session = await Session.open(Client(url, key), "trainer", name="trainer")
        batch = (await claim(session, 0, 5.0)).batch
        assert batch is not None
        publisher = Publisher(session.client, key, session.run, 16)
        about = {"commitment": batch.secret_commitment, "now": time.time()}
        signed = await publisher.publish(weights.items(), step=0, parent="", **about)
        await session.client.post(session.path("steps/0/commit"), Commit(manifest=signed, metrics={}), Done)
        await session.client.close()
        yield url
    finally:
        processes.stop()


async def worked(config: Config, url: str, folder: Path, settings: WorkerSection, leases: int) -> Recorder:
    """What a worker did until it had made so many leases and one before them, at which the engine warms up."""
    recorders: list[Recorder] = []

    def wrap(engine: Engine) -> Engine:
        recorders.append(Recorder(engine))
        return recorders[0]  # type: ignore[return-value]

    folder.mkdir(exist_ok=True)
    worker = Worker(url, Key.load_or_make(folder / "key"), folder, settings, name="beside", wrap=wrap)
    running = asyncio.create_task(worker.run())
    while not recorders and not running.done():
        await asyncio.sleep(0.01)
    trust_all(config)
    until = time.monotonic() + LIMIT_S
    while not running.done() and time.monotonic() < until and len(recorders[0].calls) <= leases:
        await asyncio.sleep(0.05)
    worker.drain()
    await running
    return recorders[0]


def pace(recorder: Recorder, leases: int) -> Pace:
    """What a worker's engine made, and the same requests made by it alone."""
    calls = recorder.calls[1 : 1 + leases]
    tokens = sum(call.tokens for call in calls)
    working_s = max(call.ended for call in calls) - calls[0].began
    generating_s = sum(call.ended - call.began for call in calls)
    began, again = time.monotonic(), 0
    for call in calls:
        again += sum(len(one.ids) for one in recorder.truth.generate(call.requests) if one is not None)
    alone_s = time.monotonic() - began
    if again != tokens:
        raise RuntimeError(f"the same requests gave {again} tokens, not {tokens}")
    return Pace(tokens / working_s, tokens / min(working_s, generating_s), tokens / alone_s)


def paces(
    model: Path, weights: dict[str, Any], settings: WorkerSection, *, rounds: int, leases: int, new: int
) -> list[Pace]:
    """Rounds of a worker's leases, each followed by the same requests to its engine alone."""

    async def play(folder: Path) -> list[Pace]:
        config = configuration(folder / "run", model, settings, new)
        found: list[Pace] = []
        async with coordinator_of(config, weights) as url:
            for _ in range(rounds):
                recorder = await worked(config, url, folder / "node", settings, leases)
                found.append(await asyncio.to_thread(pace, recorder, leases))
        return found

    with tempfile.TemporaryDirectory(prefix="farflung-beside-") as folder:
        return asyncio.run(play(Path(folder)))
