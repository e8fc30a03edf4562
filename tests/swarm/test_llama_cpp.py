"""Nodes on llama.cpp beside one of torch: the honest is trusted and trained on, one with noise of its own is not."""

import importlib.util
from pathlib import Path

import msgspec
import pytest

pytestmark = [
    pytest.mark.swarm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed: farflung[llama-cpp]"
    ),
]
torch = pytest.importorskip("torch")
pytest.importorskip("gguf")
import sqlalchemy as sa  # noqa: E402
from tests import conftest  # noqa: E402
from tests.conftest import named  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from farflung.config import WorkerSection  # noqa: E402
from farflung.protocol.errors import ConfigError  # noqa: E402
from farflung.redteam.adversary import Cheating  # noqa: E402
from farflung.redteam.noises import Unseeded  # noqa: E402
from farflung.store.tables import NODES, ROLLOUTS  # noqa: E402
from farflung.trust.evidence import Profiles, to_json  # noqa: E402
from farflung.worker import Worker  # noqa: E402
from tiny_run import IDS, play, save, tiny_run  # noqa: E402

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
NAMES = ("ada", "bob", "mallory")


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The run's own profile, and one for llama.cpp: the same bounds, for its verifiers quantise too."""
    few = {"name": "few", "engine": "llama.cpp", "bits": 4, "quantiser": "int4"}
    profile = msgspec.structs.replace(conftest.PROFILE.run, **few)
    monkeypatch.setattr(conftest, "PROFILE", Profiles(conftest.PROFILE.run, (profile,)))
    (tmp_path / "few.json").write_bytes(to_json(profile))
    return [str(tmp_path / "few.json")]


def node(site, folder: Path, name: str, engine: str = "llama.cpp", **options) -> Worker:
    return Worker(site.url, named(name), folder / name, WorkerSection(slots=4, engine=engine), name=name, **options)


def test_an_honest_one_is_trained_on_and_one_with_other_noise_is_ejected(tmp_path: Path, profiles: list[str]) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, **IDS))
    changes = {
        "model": {"profiles": profiles},
        "generate": {"samples": 4, "max_new_tokens": 32},
        "lease": {"rollouts": 4, "lease_s": 100.0, "heartbeat_s": 0.5},
        "trust": {"probation_rollouts": 8},
        "run": {"steps": 12},
        "learn": {"groups": 2, "lr": 1e-5, "oversample": 2.0},
    }
    with tiny_run(tmp_path, save(model, tmp_path / "model"), **changes) as site:
        cheat = node(site, tmp_path, "mallory", wrap=lambda engine: Cheating(engine, Unseeded()))
        play(site, tmp_path, node(site, tmp_path, "ada", "torch"), node(site, tmp_path, "bob"), cheat)
        statuses = {name: site.house.row(NODES, named(name).id).status for name in NAMES}
        assert statuses == {"ada": "trusted", "bob": "trusted", "mallory": "ejected"}
        judged = {name: site.house.row(NODES, named(name).id).profile for name in NAMES}
        assert judged == {"ada": "torch-cpu-fp32", "bob": "few", "mallory": "few"}
        trained = sa.select(ROLLOUTS.c.node, sa.func.count()).where(ROLLOUTS.c.status == "trained")
        assert dict(site.house.rows(trained.group_by(ROLLOUTS.c.node)))[named("bob").id] > 0
        bad = site.house.rows(sa.select(ROLLOUTS.c.node).where(ROLLOUTS.c.status == "void").distinct())
        assert {row.node for row in bad} <= {named("mallory").id}


def test_a_run_without_a_profile_for_it_says_how_to_measure_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with tiny_run(tmp_path, save(LlamaForCausalLM(LlamaConfig(**SHAPE, **IDS)), tmp_path / "model")) as site:

        async def scenario(_: object) -> None:
            worker = node(site, tmp_path, "bob")
            with pytest.raises(ConfigError, match=r"--engine llama\.cpp --quantiser int4"):
                await worker.open()
            await worker.client.close()

        site.house.run(scenario)
