"""Long rollouts from generation to a training step, in leases of ten seconds that progress extends.

FARFLUNG_LONG_TOKENS=32768 makes them as long as that, which takes a core for some minutes.
"""

import os
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(1800)]
torch = pytest.importorskip("torch")
from tests.conftest import named  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from farflung.config import WorkerSection  # noqa: E402
from farflung.store.tables import LEASES, NODES, ROLLOUTS  # noqa: E402
from farflung.worker import Worker  # noqa: E402
from tiny_run import IDS, play, save, tiny_run  # noqa: E402

TOKENS, LEASE_S = int(os.environ.get("FARFLUNG_LONG_TOKENS", "2048")), 10.0
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 16}
MORE = {"num_key_value_heads": 1, "tie_word_embeddings": False, "max_position_embeddings": 2 * TOKENS}


class Slow:
    """An engine that takes longer than a lease, however fast the machine: it is asked at every token."""

    def __init__(self, engine) -> None:
        self.engine = engine

    def __getattr__(self, name: str):
        return getattr(self.engine, name)

    def generate(self, requests, should_stop=None):
        def asked() -> bool:
            time.sleep(1.3 * LEASE_S / TOKENS)
            return should_stop is not None and should_stop()

        return self.engine.generate(requests, asked)


def test_long_rollouts_are_made_replayed_and_trained_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, **MORE, **IDS))
    model.lm_head.weight.data.normal_(0, 4)  # sure of most tokens, the end token hardly ever among them
    model.lm_head.weight.data[2] = 0
    changes = {
        "run": {"steps": 1},
        "generate": {"samples": 2, "max_new_tokens": TOKENS},
        "lease": {"rollouts": 4, "lease_s": LEASE_S, "heartbeat_s": 0.5, "ahead": 1.0},
        "learn": {"groups": 1, "lr": 1e-3},
        "trust": {"probation_rollouts": 2},
    }
    with tiny_run(tmp_path, save(model, tmp_path / "model"), **changes) as site:
        about = site.url, named("ada"), tmp_path / "ada", WorkerSection(slots=4)
        play(site, tmp_path, Worker(*about, name="ada", wrap=Slow))
        rows = site.house.rows(sa.select(ROLLOUTS.c.tokens).where(ROLLOUTS.c.status == "trained"))
        assert [row.tokens for row in rows] == [TOKENS, TOKENS]
        first = site.house.rows(sa.select(LEASES).order_by(LEASES.c.opened_at))[0]
        assert (first.status, first.is_partial) == ("submitted", False)
        assert first.expires_at - first.opened_at > LEASE_S
        assert site.house.row(NODES, named("ada").id).status == "trusted"
