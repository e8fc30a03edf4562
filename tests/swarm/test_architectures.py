"""Swarms whose model looks back through windows, carries a state, has experts, or whose rope depends on the length.

A model with a state is tried always, the others with FARFLUNG_EVERY_KIND=1: `tests/integration/test_architectures.py`
has them, and many more, in one process.
"""

import asyncio
import json
import os
import shutil
import sqlite3

import msgspec
import pytest
from tokenizers import Tokenizer

from farflung.config import load
from farflung.protocol import wire
from farflung.protocol.messages import SubmissionBody
from farflung.store.blobs import Blobs

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(300)]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from tests.swarm.conftest import ROOT  # noqa: E402

BASE = ROOT / "examples" / "base"
SMALL = {
    "vocab_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
STATE = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_hidden_layers": 4,
}
KINDS = ("state", "window", "experts", "dynamic rope")
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
STOPS = ("7", "12")
QUICK = (
    *("--run.steps", "3", "--swarm.workers", "2", "--swarm.kill", "0", "--learn.groups", "4", "--eval.tasks", "0"),
    *("--generate.samples", "8", "--learn.importance_cap", "0"),
    *("--generate.stop", json.dumps(STOPS)),
)


def model_of(kind: str):
    match kind:
        case "window":
            return transformers.MistralConfig(**SMALL, sliding_window=8)
        case "state":
            return transformers.Qwen3_5TextConfig(**SMALL | STATE, head_dim=8)
        case "experts":
            return transformers.Qwen3MoeConfig(**SMALL, head_dim=8, decoder_sparse_step=1, **EXPERTS)
        case "dynamic rope":
            return transformers.LlamaConfig(**SMALL, rope_parameters=DYNAMIC)
        case "short dynamic rope":
            return transformers.LlamaConfig(**SMALL | {"max_position_embeddings": 24}, rope_parameters=DYNAMIC)


def saved(kind: str, folder):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(model_of(kind))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(BASE / name, folder / name)
    return folder


@pytest.mark.parametrize("kind", KINDS if os.environ.get("FARFLUNG_EVERY_KIND") else KINDS[:1])
def test_the_cheat_is_caught_and_nobody_else(kind, start, tmp_path):
    running = start(*QUICK, "--model.path", str(saved(kind, tmp_path / "model")))
    output = running.finish()
    assert running.process.returncode == 0, output
    summary = running.summary()
    assert [node["name"] for node in summary["nodes_ejected"]] == ["mallory"]
    assert summary["honest_ejected"] == 0
    with sqlite3.connect(running.folder / "farflung.db") as database:
        query = "SELECT DISTINCT name FROM rollouts JOIN nodes USING (node) WHERE rollouts.status = 'void'"
        assert database.execute(query).fetchall() == [("mallory",)]
        check_stops(running, database)
    database.close()
    assert "model agrees" in (running.folder / "logs" / "trainer.log").read_text()


def check_stops(running, database):
    """Rollouts end with the token that completes a stop string, and none goes on behind it."""
    config, tokenizer = load(running.folder / "config.json"), Tokenizer.from_file(str(BASE / "tokenizer.json"))
    blobs = Blobs(config.submissions_url)
    query = "SELECT submission, position FROM rollouts WHERE submission IS NOT NULL AND status != 'void'"
    ends = []
    for submission, place in database.execute(query).fetchall():
        body = msgspec.msgpack.decode(asyncio.run(blobs.get(submission)), type=SubmissionBody)
        text = tokenizer.decode(wire.unpack_ids(body.rollouts[place].ids).tolist())
        ends += [stop for stop in STOPS if stop in text]
        assert all(text.find(stop) in (-1, len(text) - len(stop)) for stop in STOPS), text
    assert set(ends) == set(STOPS)


def test_a_model_that_agrees_with_itself_only_so_far_is_refused_before_the_run(start, tmp_path):
    running = start(*QUICK, "--model.path", str(saved("short dynamic rope", tmp_path / "model")))
    output = running.finish()
    assert running.process.returncode != 0
    assert "rope depends on the length" in output
