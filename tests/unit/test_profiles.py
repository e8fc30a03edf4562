"""Numerics profiles: whose each is, who picks which, and what a coordinator refuses."""

import msgspec
import pytest
from tests.conftest import FP32
from tests.standin import INFO

from farflung.config import CoordinatorSection, ModelSection
from farflung.engine.arithmetic import Own, choose
from farflung.protocol.errors import ConfigError, Forbidden
from farflung.protocol.messages import VERSION, Register, RunInfo
from farflung.tasks.admit import check
from farflung.tasks.create_run import admitted
from farflung.trust.evidence import Profile, Profiles, Tally, from_json, to_json
from farflung.trust.profiles import load_profile, load_profiles


def profile(name: str, **fields: object) -> Profile:
    return Profile(name, (0.1,), (0.3, 0.01), Tally((1, 1), (0, 0)), **FP32 | fields)


MINE = profile("plain")
HALF = profile("b", arithmetic="bfloat16", bits=16, verified_in=("bfloat16", "float32"))
CUDA = profile("any name-int8", device="cuda", arithmetic="bfloat16", bits=16, verified_in=("bfloat16", "float32"))
VLLM = profile("v", engine="vllm", device="cuda", arithmetic="bfloat16", bits=16, verified_in=("bfloat16", "float32"))
FP8 = profile("v8", engine="vllm", device="cuda", arithmetic="fp8", bits=8, verified_in=("bfloat16", "float32"))
MLX = profile("m", engine="mlx")
MLX_HALF = profile("m16", engine="mlx", device="mps", arithmetic="bfloat16", bits=16, verified_in=("bfloat16",))


def run(*profiles: Profile) -> RunInfo:
    found = {one.name: admitted(one) for one in profiles}
    return msgspec.structs.replace(INFO, profile=profiles[0].name, profiles=found)


@pytest.mark.parametrize(
    ("own", "named", "chosen"),
    [
        (Own("torch", "cpu"), "", "plain"),
        (Own("torch", "cpu"), "b", "b"),
        (Own("torch", "cpu", "bfloat16"), "", "b"),
        (Own("torch", "cuda"), "", "any name-int8"),
        (Own("vllm", "cuda", "fp8", 8), "", "v8"),
        (Own("vllm", "cuda", "bfloat16", 16), "", "v"),
        (Own("vllm", ""), "v8", "v8"),
        (Own("mlx", "cpu"), "", "m"),
        (Own("mlx", "mps"), "", "m16"),
    ],
)
def test_a_node_picks_the_profile_of_its_own_numerics_whatever_it_is_called(own: Own, named: str, chosen: str) -> None:
    assert choose(run(MINE, HALF, CUDA, VLLM, FP8, MLX, MLX_HALF), own, named) == chosen


@pytest.mark.parametrize(
    ("own", "named", "words"),
    [
        (Own("torch", "xpu"), "", "no numerics profile for torch on xpu .*farflung calibrate MODEL --device xpu"),
        (Own("vllm", "cuda", "float16", 16), "", "--device cuda --engine-url URL"),
        (Own("vllm", "cuda"), "plain", "'plain' is for torch on cpu in float32.*this node is vllm on cuda"),
        (Own("vllm", "cuda", "bfloat16", 16), "v8", "in fp8 with weights of 8 bits.*choose one of v"),
        (Own("vllm", "cuda"), "", "may be any of v, v8; name the right one with --profile"),
        (Own("mlx", "mps"), "", "no numerics profile for mlx on mps .*--device mps --engine mlx"),
        (Own("torch", "cpu"), "other", "admits no numerics profile 'other'; choose one of plain"),
    ],
)
def test_a_node_refuses_to_be_judged_by_what_is_not_its_own(own: Own, named: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose(run(MINE, HALF, CUDA, VLLM, FP8), own, named)


def test_torch_never_picks_arithmetic_that_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match="no numerics profile for torch on cpu"):
        choose(run(profile("odd", arithmetic="fp8", bits=8)), Own("torch", "cpu"))


def test_a_coordinator_refuses_a_worker_whose_engine_or_device_is_not_its_profiles() -> None:
    profiles = Profiles(MINE, (CUDA, VLLM))
    settings = CoordinatorSection()
    for said in ({}, {"engine": "torch", "device": "cpu"}, {"engine": "vllm", "device": "cuda", "profile": "v"}):
        check(settings, "", "n1", Register(version=VERSION, **said), profiles)
    check(settings, "validator", "n1", Register(version=VERSION, role="validator", device="cuda"), profiles)
    for said in ({"engine": "vllm"}, {"engine": "torch", "device": "cuda"}, {"device": "cpu", "profile": "v"}):
        with pytest.raises(Forbidden, match=r"is for .* but this node says .*farflung calibrate --device"):
            check(settings, "", "n1", Register(version=VERSION, **said), profiles)
    with pytest.raises(Forbidden, match="admits no numerics profile 'w'; choose one of plain, any name-int8, v"):
        check(settings, "", "n1", Register(version=VERSION, profile="w"), profiles)


def test_all_profiles_of_a_run_have_a_verifier_in_common(tmp_path) -> None:
    assert Profiles(MINE, (HALF, CUDA)).dtype == "float32"
    assert Profiles(HALF, (CUDA,)).dtype == "bfloat16"
    apart = tmp_path / "apart.json"
    apart.write_bytes(to_json(profile("apart", arithmetic="bfloat16", bits=16, verified_in=("bfloat16",))))
    with pytest.raises(ConfigError, match="torch-cpu-fp32 in float32, apart in bfloat16; calibrate one of them anew"):
        load_profiles(ModelSection(profiles=(str(apart),)))
    with pytest.raises(ConfigError, match="two numerics profiles are named 'torch-cpu-fp32'"):
        load_profiles(ModelSection(profiles=("torch-cpu-fp32",)))


@pytest.mark.parametrize("field", ["engine", "device", "arithmetic", "bits", "verified_in"])
def test_a_file_that_does_not_say_whose_it_is_is_refused_in_a_sentence(field: str, tmp_path) -> None:
    document = msgspec.json.decode(to_json(MINE))
    del document[field]
    (tmp_path / "old.json").write_bytes(msgspec.json.encode(document))
    with pytest.raises(ConfigError, match=f"missing required field `{field}`; make it anew with `farflung calibrate`"):
        load_profile(str(tmp_path / "old.json"))


@pytest.mark.parametrize(
    "change",
    [{"engine": "llama"}, {"device": "cuda:1"}, {"device": ""}, {"arithmetic": "int7"}, {"bits": 33}]
    + [{"verified_in": found} for found in ([], ["fp8"], ["float32"] * 4)],
)
def test_fields_are_bounded(change: dict) -> None:
    document = msgspec.json.decode(to_json(MINE)) | change
    with pytest.raises(msgspec.ValidationError):
        from_json(msgspec.json.encode(document))
