"""A numerics profile is for the runs that it was made for: others are refused, or have one made before they start."""

import asyncio
import itertools
from pathlib import Path

import msgspec
import pytest
from tests.conftest import CPU

from farflung.config import Config
from farflung.coordinator import load_profiles
from farflung.envs.sums import Sums
from farflung.launch import profile_fit
from farflung.numerics.devices import best
from farflung.ops import calibrate
from farflung.protocol.errors import ConfigError
from farflung.protocol.numerics import Quantiser
from farflung.tasks.create_run import Model, refuse_blind
from farflung.trust.evidence import WEIGHTS_OF
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


def test_a_run_on_another_device_makes_a_profile_there_at_its_start(tmp_path: Path, monkeypatch) -> None:
    asked: list[str] = []

    async def calibrate(config: Config, name: str, made: Path) -> None:
        asked.append(f"{name} on {config.worker.device}")

    monkeypatch.setattr(profile_fit, "_calibrate", calibrate)
    said: list[str] = []
    elsewhere = config(tmp_path)
    elsewhere = elsewhere.model_copy(update={"worker": elsewhere.worker.model_copy(update={"device": "cuda:1"})})
    found = asyncio.run(profile_fit.calibrated(elsewhere, said.append))
    assert asked == ["torch-cpu-fp32 on cuda:1"]
    assert "was calibrated for cpu, this run's nodes compute on cuda: calibrating on this machine" in said[0]
    assert found.model.profile == str(tmp_path / "fit" / "profiles" / "torch-cpu-fp32.json")
    no_workers = elsewhere.model_copy(update={"swarm": elsewhere.swarm.model_copy(update={"workers": 0})})
    assert asyncio.run(profile_fit.calibrated(no_workers, said.append)) == no_workers, "its nodes are elsewhere"


def test_torch_says_which_device_is_the_best_where_a_driver_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_fit, "DRIVERS", ("/",))
    assert asyncio.run(profile_fit._device("auto")) == best()
    assert asyncio.run(profile_fit._device("cuda:3")) == "cuda"
    monkeypatch.setattr(profile_fit, "DRIVERS", ())
    assert asyncio.run(profile_fit._device("auto")) == "cpu"


@pytest.mark.parametrize(
    ("numerics", "name"),
    [
        (("cpu", "", ""), "torch-cpu-fp32"),
        (("cuda", "", ""), "torch-cuda-bf16"),
        (("cuda", "float16", ""), "torch-cuda-fp16"),
        (("cpu", "float32", "int8"), "torch-cpu-fp32-int8"),
    ],
)
def test_a_profile_is_named_after_what_it_is_of(numerics: tuple[str, str, Quantiser], name: str) -> None:
    found = calibrate.numerics_of(*numerics)
    assert calibrate.name_of(found) == name
    assert found.bits == (8 if numerics[2] else 32 if found.arithmetic == "float32" else 16)


def test_what_torch_cannot_compute_in_is_not_measured() -> None:
    with pytest.raises(ConfigError, match="asked to measure torch on cpu in fp8"):
        calibrate.numerics_of("cpu", "fp8")


def test_a_profile_says_whose_it_is_and_what_it_was_verified_in() -> None:
    model = Model(str(BASE))
    asked = [tuple(model.prompt_ids(Sums().prompt(task))) for task in itertools.islice(Sums().tasks("train"), 64)]
    under = calibrate.Conditions(model, asked, temperature=2.0, max_new_tokens=16)
    numerics = calibrate.numerics_of("cpu", "float32", "int8")
    options = {"tokens": 6000, "threads": 1, "kinds": calibrate.KINDS[:1], "cheats": ("unseeded",)}
    found = calibrate.make_profile(under, "small", numerics, **options)
    assert found.fields == numerics.fields
    assert found.verified_in == ("float32",)
    assert found.noise < 1e-5, "the verifiers quantise as well"
    assert found.power[f"{WEIGHTS_OF}int4"] > 0
    refuse_blind(found)
    blind = msgspec.structs.replace(found, power={f"{WEIGHTS_OF}int4": 1e-6})
    with pytest.raises(ConfigError, match="does not tell weights of int4 from its own int8 within 200,000 tokens"):
        refuse_blind(blind)


def test_a_profile_counts_processors_with_older_instructions() -> None:
    model = Model(str(BASE))
    asked = [tuple(model.prompt_ids(prompt)) for prompt in ("12+34=", "7+8=")]
    older = [kind for kind in calibrate.KINDS if kind.is_older]
    under = calibrate.Conditions(model, asked, temperature=1.0, max_new_tokens=8)
    found = calibrate.make_profile(
        under, "torch-cpu-fp32", CPU["numerics"], tokens=1600, threads=1, kinds=older, cheats=()
    )
    assert sum(found.honest.positions) >= 100, "a sixteenth of the tokens is generated so"


def test_every_profile_of_the_package_says_for_what_it_is() -> None:
    models = {Model(str(BASE)).digest: "the demo's"}
    for name in names():
        profile = load_profile(name)
        assert profile.scope is not None, name
        assert profile.scope.temperature == 1.0
        assert profile.margin == 3
        assert profile.scope.model in models
