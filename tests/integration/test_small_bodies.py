"""Three workers, a validator and a trainer whose model has an embedding that is larger than any body may be."""

import asyncio
import contextlib
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
import sqlalchemy as sa
import torch
from tests.conftest import BASE, House, named, settings
from tests.served import Served
from transformers import Qwen3Config, Qwen3ForCausalLM

from farflung.config import Config, ValidatorSection, WorkerSection
from farflung.coordinator import routes
from farflung.queries.browse import open_unchecked
from farflung.store.db import migrate
from farflung.store.tables import ROLLOUTS, STEPS, SUBMISSIONS
from farflung.trainer import Trainer
from farflung.validator import Validator
from farflung.weights import parts, publish
from farflung.worker import Worker

PART_BYTES, BODY_BYTES, STEPS_MADE = 2048, 3500, 3
EMBEDDING_BYTES = 32 * 64 * 2
SHAPE = {"hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
MORE = {"vocab_size": 32, "num_key_value_heads": 1, "tie_word_embeddings": True, "initializer_range": 0.2}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 128}
WORKERS = ("ada", "bob", "cy")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model with the tokenizer of the demo's."""
    folder = tmp_path / "model"
    torch.manual_seed(0)
    made = Qwen3ForCausalLM(Qwen3Config(**SHAPE, **MORE, **IDS)).bfloat16()
    made.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, folder)
    return folder


@pytest.fixture
def site(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A coordinator on a socket that takes bodies of weights up to less than the embedding."""
    for module, name, size in (
        (parts, "PART_BYTES", PART_BYTES),
        (publish, "SHARD_BYTES", PART_BYTES),
        (routes, "BLOB_BYTES", BODY_BYTES),
    ):
        monkeypatch.setattr(module, name, size)
    config = settings(
        tmp_path,
        model={"path": str(model)},
        run={"steps": STEPS_MADE},
        eval={"tasks": 0},
        lease={"heartbeat_s": 0.2, "ahead": 6.0},
        trust={"canaries": 0, "self_test": 0, "audit_floor": 0.1},
        learn={"lr": 1e-3},
    )
    config.folder.mkdir()
    migrate(config.database_url)
    found = Served(asyncio.run(House.open(config)))
    yield found
    found.close()
    found.house.close()


@contextlib.asynccontextmanager
async def running(*roles: Any) -> AsyncIterator[None]:
    """While all of these live; each must end well."""
    tasks = [asyncio.create_task(role.run()) for role in roles]
    yield
    await asyncio.gather(*tasks)


def test_three_nodes_train_a_model_whose_embedding_no_body_holds(site: Served, tmp_path: Path) -> None:
    assert EMBEDDING_BYTES > BODY_BYTES
    config: Config = site.house.config
    trainer = Trainer(site.url, named("trainer"), config)
    training = threading.Thread(target=lambda: asyncio.run(trainer.run()))
    workers = [Worker(site.url, named(name), tmp_path / name, WorkerSection(slots=4), name=name) for name in WORKERS]
    validator = Validator(site.url, named("val-1"), tmp_path / "val-1", ValidatorSection(linger_s=0), name="val-1")

    async def scenario(house: House) -> None:
        training.start()
        async with running(*workers, validator):
            while len(handed_in(house)) < len(WORKERS):  # a step needs rewards, so none is over before that
                await asyncio.sleep(0.05)
            while training.is_alive():
                await house.score()
                await asyncio.sleep(0.05)

    site.house.run(scenario)
    training.join()
    check_parts(site.house)
    steps = [line for line in site.house.ctx.metrics.lines() if line["kind"] == "step" and line["step"]]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(0 < line["reward"] < 1 and line["tokens"] > 0 for line in steps)
    assert site.house.statuses(ROLLOUTS)["trained"] >= STEPS_MADE * 4
    assert handed_in(site.house) == {named(name).id for name in WORKERS}


def handed_in(house: House) -> set[str]:
    """Nodes with a receipt."""
    return {row.node for row in house.rows(sa.select(SUBMISSIONS.c.node))}


def check_parts(house: House) -> None:
    """Every step carries the embedding in parts, in shards that a body holds, and its weights moved."""
    rows = house.rows(sa.select(STEPS.c.manifest).where(STEPS.c.manifest.is_not(None)).order_by(STEPS.c.step))
    manifests = [open_unchecked(row.manifest) for row in rows]
    assert len(manifests) == STEPS_MADE + 1
    for manifest in manifests:
        names = [tensor.name for tensor in manifest.tensors if "embed_tokens" in tensor.name]
        assert names == [f"model.embed_tokens.weight[{number}]" for number in range(EMBEDDING_BYTES // PART_BYTES)]
        assert max(shard.size_bytes for shard in (*manifest.shards, *manifest.deltas)) <= BODY_BYTES
    assert len({manifest.digest for manifest in manifests}) == len(manifests)
