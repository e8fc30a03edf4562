"""A numerics profile is for the runs that it was made for: others are refused, or have one made before they start."""

import asyncio
from pathlib import Path

import pytest

from farflung.config import Config
from farflung.coordinator import load_profiles
from farflung.launch import profile_fit
from farflung.ops import calibrate
from farflung.protocol.errors import ConfigError
from farflung.tasks.create_run import Model
from farflung.trust.profiles import load_profile, names

BASE = Path(__file__).parents[2] / "examples" / "base"


def config(folder: Path, **generate: float) -> Config:
    tree = {
        "run": {"name": "fit", "dir": str(folder)},
        "model": {"path": str(BASE)},
        "generate": {"max_new_tokens": 16} | generate,
    }
    return Config.model_validate(tree)


def test_a_run_within_the_profiles_of_the_package_takes_them(tmp_path: Path) -> None:
    said: list[str] = []
    found = asyncio.run(profile_fit.calibrated(config(tmp_path), said.append))
    assert (found.model.profile, said) == ("torch-cpu-fp32", [])
    assert load_profiles(found).names == ["torch-cpu-fp32"]


@pytest.mark.parametrize(
    ("generate", "words"),
    [({"temperature": 0.3}, "temperature 1, the run's is 0.3"), ({"max_new_tokens": 4096}, "up to 32")],
)
def test_a_coordinator_refuses_a_profile_of_other_runs_in_a_sentence(tmp_path: Path, generate, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        load_profiles(config(tmp_path, **generate))
    assert "farflung calibrate" in str(refused.value)


def test_a_profile_is_made_before_a_run_that_none_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_fit, "TOKENS", 300)
    said: list[str] = []
    found = asyncio.run(profile_fit.calibrated(config(tmp_path, temperature=0.5), said.append))
    profile = load_profiles(found).run
    assert profile.scope is not None
    assert (profile.name, profile.scope.temperature, profile.scope.tokens) == ("torch-cpu-fp32", 0.5, 16)
    assert profile.margin == 3
    assert len(said) == 1
    again = asyncio.run(profile_fit.calibrated(config(tmp_path, temperature=0.5), said.append))
    assert again == found, "resumed, it is there"
    assert len(said) == 1


def test_a_profile_counts_processors_with_older_instructions() -> None:
    model = Model(str(BASE))
    asked = [tuple(model.prompt_ids(prompt)) for prompt in ("12+34=", "7+8=")]
    older = [kind for kind in calibrate.KINDS if kind.is_older]
    under = calibrate.Conditions(model, asked, temperature=1.0, max_new_tokens=8)
    found = calibrate.make_profile(under, "torch-cpu-fp32", tokens=1600, threads=1, kinds=older, cheats=())
    assert sum(found.honest.positions) >= 100, "a sixteenth of the tokens is generated so"


def test_every_profile_of_the_package_says_for_what_it_is() -> None:
    models = {Model(str(BASE)).digest: "the demo's"}
    for name in names():
        profile = load_profile(name)
        assert profile.scope is not None, name
        assert profile.scope.temperature == 1.0
        assert profile.margin == 3
        assert profile.scope.model in models
