"""Worker, validator and trainer with a `device` of their own: what they make, replay and train on is computed there."""

import asyncio
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch
import transformers
from tests import conftest
from tests.conftest import BASE, House, named, settings
from tests.served import Served

from farflung.config import Config, ValidatorSection, WorkerSection
from farflung.store.db import migrate
from farflung.store.tables import AUDITS, NODES, ROLLOUTS
from farflung.trainer import Trainer
from farflung.trust.evidence import Profiles
from farflung.validator import Validator
from farflung.worker import Worker
from second_device import DEVICES

WAIT_S = 100.0
TRUST = {"canaries": 1, "self_test": 0}
LEARN = {"lr": 1e-3, "minibatches": 2, "kl": 0.1, "precision": "float32"}
ADAPTERS = {"lr": 1e-3, "lora_rank": 4, "precision": "bfloat16", "rounding": "dithered"}


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model's tokenizer, with weights of one layer."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(BASE, folder, dirs_exist_ok=True)
    config = transformers.AutoConfig.from_pretrained(BASE)
    config.update({"hidden_size": 32, "head_dim": 8, "num_hidden_layers": 1, "layer_types": ["full_attention"]})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def served(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    sites: list[Served] = []

    def serve(**learn: Any) -> Served:
        own = msgspec.structs.replace(conftest.PROFILE.run, device=torch.device(learn["device"]).type)
        monkeypatch.setattr(conftest, "PROFILE", Profiles(own))
        config = settings(tmp_path, model={"path": str(small_model)}, eval={"every": 1}, trust=TRUST, learn=learn)
        config.folder.mkdir()
        migrate(config.database_url)
        sites.append(Served(asyncio.run(House.open(config))))
        return sites[-1]

    yield serve
    for site in sites:
        site.close()
        site.house.close()


def ends_at(config: Config, steps: int) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"steps": steps})})


@pytest.mark.timeout(WAIT_S)
@pytest.mark.parametrize(("learn", "ends"), [(LEARN, (1, 2)), (ADAPTERS, (1,))], ids=["all weights, kl", "adapters"])
@pytest.mark.parametrize("place", DEVICES[1:])
def test_every_role_computes_where_its_setting_says(served, tmp_path, place, learn, ends) -> None:
    """The trainer has its tripwire; where it is started again it goes on from its checkpoint."""
    site = served(device=place, **learn)
    worker = Worker(site.url, named("ada"), tmp_path / "ada", WorkerSection(device=place))
    validator = Validator(site.url, named("val-1"), tmp_path / "val-1", ValidatorSection(device=place))
    trainers = [Trainer(site.url, named("trainer"), ends_at(site.house.config, steps)) for steps in ends]

    of_worker: list[Any] = []

    async def scenario(house: House) -> None:
        others: list[asyncio.Task[None]] = []
        async with asyncio.timeout(WAIT_S):
            for trainer in trainers:
                running = asyncio.create_task(trainer.run())
                while not running.done():
                    if trainer.done_step >= 0 and not others:
                        others = [asyncio.create_task(role.run()) for role in (worker, validator)]
                    await house.score()
                    await asyncio.sleep(0.05)
                await running
            of_worker.append(worker.engine)  # it lets go of it when it leaves
            worker.drain()
            validator.stop()
            await asyncio.gather(*others)

    site.house.run(scenario)
    judges = [loaded.engine for loaded in validator.engines._held.values()]
    engines = [*of_worker, *judges, *(trainer.checker._held.engine for trainer in trainers)]
    models = [*(engine.model for engine in engines), *(one.distributed.learner.policy.model for one in trainers)]
    assert {tensor.device.type for model in models for tensor in model.state_dict().values()} == {
        torch.device(place).type
    }
    assert site.house.statuses(ROLLOUTS)["trained"] > 0
    assert site.house.statuses(AUDITS)["done"] > 0
    assert not set(site.house.statuses(NODES)) & {"ejected", "quarantined"}, "honest everywhere"
    lines = [line for line in site.house.ctx.metrics.lines() if line["kind"] == "step"]
    assert [line["step"] for line in lines] == [*range(ends[-1] + 1)]
    assert all(math.isfinite(line["loss"]) for line in lines[1:])
