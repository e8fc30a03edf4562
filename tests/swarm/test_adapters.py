"""A run that publishes adapters alone: it learns, the cheat alone is ejected, and a trainer that dies goes on."""

import sqlite3

import pytest

from farflung.ops.export import export
from farflung.queries.browse import open_unchecked

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(400)]
ADAPTERS = (
    *("--run.steps", "6", "--eval.tasks", "128", "--eval.samples", "0", "--learn.lora_rank", "8", "--learn.lr", "3e-3"),
    *("--learn.checkpoint_every", "3", "--learn.groups", "8", "--swarm.relays", "1"),
    *("--swarm.workers", "2", "--swarm.kill", "0"),
)


def test_adapters_alone_teach_every_node(start, tmp_path):
    run = start(*ADAPTERS)
    run.wait_for(lambda status: status["latest"]["step"] >= 4)
    run.kill("trainer")
    output = run.finish()
    assert run.process.returncode == 0, output
    summary = run.summary()
    assert summary["eval_after"] - summary["eval_before"] >= 0.15
    assert [node["name"] for node in summary["nodes_ejected"]] == ["mallory"]
    assert summary["honest_ejected"] == 0
    with sqlite3.connect(run.folder / "farflung.db") as database:
        sealed = database.execute("SELECT manifest FROM steps ORDER BY step").fetchall()
    database.close()
    first, *later = [open_unchecked(manifest) for (manifest,) in sealed]
    assert first.anchor_bytes
    assert not first.adapters
    for manifest in later:
        assert manifest.adapters
        assert manifest.shards[: manifest.base_shards] == first.shards
        assert 0 < manifest.delta_bytes < first.anchor_bytes / 4
    assert "replayed step=" in (run.folder / "logs" / "trainer.log").read_text()
    assert export(run.folder, tmp_path / "out") == 6, "its digest is the one on record"
