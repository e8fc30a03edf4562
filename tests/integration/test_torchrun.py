"""The trainer on two processes, as torchrun starts it, against a real coordinator: it trains as one process does."""

import asyncio
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

pytest.importorskip("torch")
import torch
from tests.conftest import House, named
from tests.served import Served

from farflung.config import Config, save
from farflung.engine.local import LocalEngine
from farflung.net.session import Session
from farflung.protocol import messages as m
from farflung.protocol import probe
from farflung.protocol.errors import WeightsError
from farflung.protocol.identity import Signed, seal, unseal
from farflung.rollouts.submit import generate, submission_of
from farflung.store.tables import STEPS
from farflung.trainer import Trainer
from farflung.weights.cache import Versions
from farflung.weights.loaded import Loaded
from farflung.weights.manifest import KIND
from farflung.weights.patch import patch
from farflung.weights.tensors import empty_engine

WAIT_S = 240.0
METRICS = ("loss", "grad_norm", "entropy", "ratio_mean", "tokens", "importance", "reward")


class Site(Served):
    """A coordinator on a socket."""

    def config(self, steps: int) -> Config:
        """The trainer's own: it leaves after so many steps."""
        run = self.house.config.run
        return self.house.config.model_copy(update={"run": run.model_copy(update={"steps": steps})})

    def play(self, steps: int) -> None:
        """Rollouts for the trainer, until it has committed so many steps."""

        async def scenario(house: House) -> None:
            until, node = time.monotonic() + WAIT_S, None
            while _committed(house) < steps:
                assert time.monotonic() < until, f"no step {steps} after {WAIT_S:.0f} s"
                if _committed(house) >= 0 and (lease := await house.ask("ada")) is not None:
                    node = node or await Node.join(house)
                    await house.submit("ada", lease, await node.work(lease))
                    await audit(house)
                    await house.score()
                await asyncio.sleep(0.05)

        self.house.run(scenario)


class Node:
    """A worker's engine, and the versions that were published."""

    def __init__(self, engine: LocalEngine, versions: Versions) -> None:
        self.engine, self.loaded = engine, Loaded(engine, versions)

    @classmethod
    async def join(cls, house: House) -> "Node":
        session = await Session.open(await house.client("ada"), "worker", name="ada")
        versions = Versions(session, house.config.folder / "nodes" / "ada", use_relays=False, patch=patch)
        return cls(await empty_engine(session), versions)

    async def work(self, lease: m.Lease) -> m.Submission:
        """The text that the seeds give."""
        await self.loaded.fetch(lease.manifest)
        self.loaded.ensure(lease.manifest)
        done = generate(self.engine, lease, lambda: False)
        shown = self.loaded.possession(lease.nonce, lease.probe)
        return submission_of(done, assigned=len(done), generate_s=1.0, possession=shown)


def _committed(house: House) -> int:
    lines = [line["step"] for line in house.ctx.metrics.lines() if line["kind"] == "step"]
    return max(lines, default=-1)


def possession(house: House, step: int, nonce: str) -> str:
    """What an engine with the weights of a step answers to its probe."""
    (row,) = house.rows(sa.select(STEPS.c.probe).where(STEPS.c.step == step))
    return probe.answer(nonce, row.probe)


async def audit(house: House) -> None:
    """Find nothing wrong."""
    while jobs := await house.claim_audits():
        for job in jobs:
            shown = possession(house, job.step, job.nonce)
            sealed = seal(named("val-1"), "evidence", house.evidence(job, lambda _: False, possession=shown))
            await house.tell("val-1", f"audits/{job.audit}/evidence", sealed, m.Done)


def steps_of(house: House) -> list[dict[str, Any]]:
    """What each trained step came to."""
    return [line for line in house.ctx.metrics.lines() if line["kind"] == "step" and line["step"]]


def alone(site: Site, steps: int) -> dict[str, torch.Tensor]:
    """The trainer in this process, to the end of its steps; gives its weights."""
    trainer = Trainer(site.url, named("trainer"), site.config(steps))
    thread = threading.Thread(target=lambda: asyncio.run(trainer.run()), daemon=True)
    thread.start()
    site.play(steps)
    thread.join(WAIT_S)
    assert not thread.is_alive()
    return dict(trainer.distributed.masters())


def by_torchrun(site: Site, steps: int, folder: Path) -> None:
    """The same on two processes."""
    keys = site.house.config.folder / "keys"
    keys.mkdir(exist_ok=True)
    (keys / "trainer").write_text(named("trainer").seed.hex() + "\n")
    save(site.config(steps), folder / "trainer.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port())]
    command += ["-m", "farflung", "trainer", str(folder / "trainer.json"), "--url", site.url]
    child = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    try:
        site.play(steps)
        errors = child.communicate(timeout=WAIT_S)[1].decode()
    finally:
        child.kill()
    assert child.returncode == 0, errors
    assert "rank=1 of=2" in errors
    assert "WARNING" not in errors, "honest text trips"


def port() -> int:
    return 20_000 + os.getpid() % 20_000


@pytest.fixture
def sites(make_house) -> Iterator[Any]:
    made: list[Site] = []

    def make(**learn: Any) -> Site:
        house = make_house(
            run={"steps": 4},
            eval={"tasks": 0},
            trust={"canaries": 0, "self_test": 0},
            learn={
                "lr": 1e-3,
                "minibatches": 2,
                "entropy": 0.01,
                "lockstep": True,
                "precision": "float32",  # bfloat16 rounds by more than the bounds below
                "max_staleness": 0,
            }
            | learn,
        )
        made.append(Site(house))
        return made[-1]

    yield make
    for site in made:
        site.close()


@pytest.mark.timeout(3 * WAIT_S)
def test_two_processes_train_as_one_and_go_on_from_its_checkpoint_as_it_does_from_theirs(sites, tmp_path: Path) -> None:
    one, two = sites(), sites()
    wanted = alone(one, 3)
    alone(two, 1)
    by_torchrun(two, 2, tmp_path)
    folder = two.house.config.folder / "checkpoints" / "step-000002"
    assert len(list(folder.glob("model-*-of-00002.safetensors"))) == 2
    found = alone(two, 3)
    for single, double in itertools.zip_longest(steps_of(one.house), steps_of(two.house)):
        assert double["tripwire_s"] > 0
        for name in METRICS:
            assert single[name] == pytest.approx(double[name], rel=2e-3, abs=1e-4), (single["step"], name)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-3, msg=name)


async def refused(trainer: Trainer) -> None:
    with pytest.raises(WeightsError, match="of the weights differ"):
        await trainer.run()
    await trainer._loaded._versions.close()
    await trainer.client.close()


@pytest.mark.parametrize(("factor", "goes_on"), [(1.00005, True), (3.0, False)])
def test_a_step_that_is_not_repeated_to_the_bit_is_taken_for_it_if_near(sites, factor: float, goes_on: bool) -> None:
    """The trainer ends without a checkpoint of step 1, and comes back on a machine that computes a little otherwise."""
    site = sites(checkpoint_every=2)
    alone(site, 1)
    learn = site.house.config.learn
    other = learn.model_copy(update={"lr": learn.lr * factor})
    config = site.config(2).model_copy(update={"learn": other})
    trainer = Trainer(site.url, named("trainer"), config)
    if not goes_on:
        return asyncio.run(refused(trainer))
    thread = threading.Thread(target=lambda: asyncio.run(trainer.run()), daemon=True)
    thread.start()
    site.play(2)
    thread.join(WAIT_S)
    last = steps_of(site.house)[-1]
    assert last["step"] == 2
    assert 0 < last["replay_off"] < 0.01
    (row,) = site.house.rows(sa.select(STEPS.c.manifest).where(STEPS.c.step == 2))
    signed = msgspec.msgpack.decode(row.manifest, type=Signed)
    assert unseal(signed, KIND, m.Manifest).shards, "it is an anchor"


def test_a_trainer_that_waits_for_its_batch_leaves_when_told(sites, monkeypatch) -> None:
    monkeypatch.setattr("farflung.trainer.WAIT_S", 30.0)
    site = sites()
    trainer = Trainer(site.url, named("trainer"), site.config(3))

    async def life() -> None:
        running = asyncio.create_task(trainer.run())
        while trainer.done_step < 0 or trainer._asking is None:  # published, and nobody generates
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        trainer.stop()
        await asyncio.wait_for(running, 15)  # half of what it would wait for its batch

    asyncio.run(life())
    assert trainer.done_step == 0
