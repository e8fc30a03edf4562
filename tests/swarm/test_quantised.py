"""Nodes with quantised weights beside others: the honest are trusted, one with fewer bits than it declares is not."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(900)]
torch = pytest.importorskip("torch")
import sqlalchemy as sa  # noqa: E402
from tests import conftest  # noqa: E402
from tests.conftest import named  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from farflung.config import ValidatorSection, WorkerSection  # noqa: E402
from farflung.protocol.errors import WeightsError  # noqa: E402
from farflung.redteam.adversary import Cheating  # noqa: E402
from farflung.redteam.other_weights import Quantised  # noqa: E402
from farflung.store.tables import NODES, ROLLOUTS  # noqa: E402
from farflung.trust.evidence import WEIGHTS_OF, Profiles, to_json  # noqa: E402
from farflung.validator import Validator  # noqa: E402
from farflung.worker import Worker  # noqa: E402
from tiny_run import IDS, play, save, tiny_run  # noqa: E402

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
MORE = {"num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.2}


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The run's own profile, and one for int8: the same bounds, for its verifiers quantise too."""
    power = {f"{WEIGHTS_OF}int4": 0.1}
    int8 = msgspec.structs.replace(conftest.PROFILE.run, name="small", bits=8, quantiser="int8", power=power)
    monkeypatch.setattr(conftest, "PROFILE", Profiles(conftest.PROFILE.run, (int8,)))
    path = tmp_path / "small.json"
    path.write_bytes(to_json(int8))
    return [str(path)]


def changed(profiles: list[str], max_new_tokens: int, **more: dict) -> dict[str, dict]:
    """The settings that the runs here share, and what one of them has besides."""
    settings = {
        "model": {"profiles": profiles},
        "generate": {"samples": 4, "max_new_tokens": max_new_tokens},
        "lease": {"rollouts": 4, "lease_s": 100.0, "heartbeat_s": 0.5},
        "trust": {"probation_rollouts": 4},
        "run": {"steps": 4},
    }
    return {name: settings.get(name, {}) | more.get(name, {}) for name in settings | more}


def node(site, folder: Path, name: str, profile: str = "", **options) -> Worker:
    return Worker(site.url, named(name), folder / name, WorkerSection(slots=4, profile=profile), name=name, **options)


def test_an_honest_one_is_trusted_and_trained_on_and_a_coarser_one_is_ejected(
    tmp_path: Path, profiles: list[str]
) -> None:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, **MORE, **IDS))
    learn = {"groups": 2, "lr": 1e-5, "oversample": 2.0}
    changes = changed(profiles, 32, run={"steps": 12}, learn=learn, trust={"probation_rollouts": 8})
    with tiny_run(tmp_path, save(model, tmp_path / "model"), **changes) as site:
        small = node(site, tmp_path, "bob", "small")
        posing = node(site, tmp_path, "mallory", "small", wrap=lambda engine: Cheating(engine, Quantised("int4")))
        play(site, tmp_path, node(site, tmp_path, "ada"), small, posing)
        statuses = {name: site.house.row(NODES, named(name).id).status for name in ("ada", "bob", "mallory")}
        assert statuses == {"ada": "trusted", "bob": "trusted", "mallory": "ejected"}
        trained = sa.select(ROLLOUTS.c.node, sa.func.count()).where(ROLLOUTS.c.status == "trained")
        counts = dict(site.house.rows(trained.group_by(ROLLOUTS.c.node)))
        assert counts[named("bob").id] > 0
        assert counts[named("ada").id] > 0
        bad = site.house.rows(sa.select(ROLLOUTS.c.node).where(ROLLOUTS.c.status == "void").distinct())
        assert {row.node for row in bad} <= {named("mallory").id}


def test_in_lockstep_a_trainer_that_holds_its_own_weights_replays_them_quantised(
    tmp_path: Path, profiles: list[str]
) -> None:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, **MORE, **IDS))
    learn = {"groups": 2, "lr": 1e-5, "lockstep": True, "max_staleness": 0, "oversample": 1.0, "minibatches": 2}
    changes = changed(profiles, 8, run={"steps": 3}, learn=learn)
    with tiny_run(tmp_path, save(model, tmp_path / "model"), **changes) as site:
        play(site, tmp_path, node(site, tmp_path, "bob", "small"))
        assert site.house.statuses(ROLLOUTS)["trained"] > 0
        assert site.house.row(NODES, named("bob").id).status == "trusted"


def test_a_version_that_a_validator_let_go_of_is_fetched_again(tmp_path: Path) -> None:
    validator = Validator("http://127.0.0.1:1", named("val-1"), tmp_path / "v", ValidatorSection())
    asked: list[str] = []

    async def fetch(digest: str) -> None:
        asked.append(digest)

    def replay(jobs: list) -> list:
        if not asked:
            raise WeightsError("its patched copy is gone")
        return ["evidence"]

    validator.weights = SimpleNamespace(fetch=fetch)
    validator.engines = SimpleNamespace(invalidate=lambda: None)
    validator._replay = replay
    assert asyncio.run(validator._evidence([SimpleNamespace(manifest="m")])) == ["evidence"]
    assert asked == ["m"]


def test_their_share_of_the_work_is_kept_to(tmp_path: Path, profiles: list[str]) -> None:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, **MORE, **IDS))
    learn = {"groups": 4, "lr": 1e-5, "quantised_share": 0.25}
    changes = changed(profiles, 8, learn=learn, lease={"ahead": 1.0})
    with tiny_run(tmp_path, save(model, tmp_path / "model"), **changes) as site:
        play(site, tmp_path, node(site, tmp_path, "ada"), node(site, tmp_path, "bob", "small"))
        trained = sa.select(ROLLOUTS.c.node, sa.func.count()).where(ROLLOUTS.c.status == "trained")
        counts = dict(site.house.rows(trained.group_by(ROLLOUTS.c.node)))
        assert 0 < counts.get(named("bob").id, 0) <= 0.5 * sum(counts.values())
