"""Three workers, a validator and a trainer whose model has an embedding that is larger than any body may be."""

from pathlib import Path

import pytest

pytest.importorskip("torch")
import sqlalchemy as sa
import torch
from tests.conftest import House, named
from transformers import Qwen3Config, Qwen3ForCausalLM

from farflung.config import WorkerSection
from farflung.coordinator import routes
from farflung.queries.browse import open_unchecked
from farflung.store.tables import ROLLOUTS, STEPS, SUBMISSIONS
from farflung.weights import parts, publish
from farflung.worker import Worker
from tiny_run import IDS, play, save, tiny_run

PART_BYTES, BODY_BYTES, STEPS_MADE = 2048, 3500, 3
EMBEDDING_BYTES = 32 * 64 * 2
SHAPE = {"hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
MORE = {"num_key_value_heads": 1, "tie_word_embeddings": True, "initializer_range": 0.2, "max_position_embeddings": 128}
WORKERS = ("ada", "bob", "cy")


@pytest.fixture
def small_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator takes bodies of weights up to less than the embedding."""
    assert EMBEDDING_BYTES > BODY_BYTES
    monkeypatch.setattr(parts, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(publish, "SHARD_BYTES", PART_BYTES)
    monkeypatch.setattr(routes, "BLOB_BYTES", BODY_BYTES)


@pytest.mark.usefixtures("small_bodies")
def test_three_nodes_train_a_model_whose_embedding_no_body_holds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = save(Qwen3ForCausalLM(Qwen3Config(**SHAPE, **MORE, **IDS)), tmp_path / "model")
    changes = {
        "run": {"steps": STEPS_MADE},
        "lease": {"heartbeat_s": 0.2, "ahead": 6.0},
        "trust": {"audit_floor": 0.1},
        "learn": {"lr": 1e-3},
    }
    with tiny_run(tmp_path, model, **changes) as site:
        settings = WorkerSection(slots=4)
        workers = [Worker(site.url, named(name), tmp_path / name, settings, name=name) for name in WORKERS]
        everybody = {named(name).id for name in WORKERS}
        play(site, tmp_path, *workers, may_score=lambda: handed_in(site.house) == everybody)  # a step waits for them
        check_parts(site.house)
        check_training(site.house)


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


def check_training(house: House) -> None:
    """Every step was trained on rollouts with rewards."""
    steps = [line for line in house.ctx.metrics.lines() if line["kind"] == "step" and line["step"]]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(0 < line["reward"] < 1 and line["tokens"] > 0 for line in steps)
    assert house.statuses(ROLLOUTS)["trained"] >= STEPS_MADE * 4
