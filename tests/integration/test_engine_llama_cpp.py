"""llama.cpp as an engine: the file that it reads holds the canonical int4, and its texts are what the seeds give.

What needs the file alone runs everywhere; what needs llama.cpp is skipped where `llama-cpp-python` is not installed.
"""

import asyncio
import importlib.util
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
from tests.conftest import BASE  # noqa: E402
from transformers import (  # noqa: E402
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from farflung.config import WorkerSection  # noqa: E402
from farflung.engine.arithmetic import Own, choose  # noqa: E402
from farflung.engine.base import Completion, Request  # noqa: E402
from farflung.engine.gguf_file import GgufFile  # noqa: E402
from farflung.engine.llama_cpp import FILE, LlamaCppEngine, own_llama_cpp  # noqa: E402
from farflung.engine.local import LocalEngine  # noqa: E402
from farflung.numerics.q4_0 import packed, unpacked  # noqa: E402
from farflung.numerics.quantise import is_quantised, quantise, quantised  # noqa: E402
from farflung.ops import doctor  # noqa: E402
from farflung.ops.calibrate import name_of, numerics_of, write_profile  # noqa: E402
from farflung.protocol.errors import ConfigError, WeightsError  # noqa: E402
from farflung.protocol.numerics import Numerics  # noqa: E402
from farflung.protocol.probe import Slice  # noqa: E402
from farflung.protocol.stops import DONE, Stops  # noqa: E402

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed: farflung[llama-cpp]"
)
SHAPE = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": 1,
    "bos_token_id": None,
}
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": True, "head_dim": 32}),
}


def made(kind: str = "qwen3", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A tiny model of this architecture, every value of it random, in bfloat16."""
    model, config, more = KINDS[kind]
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    found = model(config(**(SHAPE | more | changes)))
    for parameter in found.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return found.bfloat16().eval()


def config_of(model: PreTrainedModel) -> bytes:
    return model.config.to_json_string().encode()


def tensors_of(model: PreTrainedModel, quantiser: str = "int4") -> list[tuple[str, torch.Tensor]]:
    return list(quantised(model.state_dict().items(), quantiser))


def verifier(model: PreTrainedModel) -> LocalEngine:
    """torch in float32 with the same quantised weights."""
    found = LocalEngine.from_folder(config_of(model), eos_ids=[1])
    found.load(tensors_of(model))
    return found


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., LlamaCppEngine]:
    def make(model: PreTrainedModel, **options: object) -> LlamaCppEngine:
        found = LlamaCppEngine(tmp_path / "engine", config_of(model), **{"eos_ids": [1]} | options)
        found.load(tensors_of(model))
        return found

    return make


def requests(count: int, *, new: int = 12, temperature: float = 1.0, alike: int = 3) -> list[Request]:
    """Groups of a few seeds on one prompt, prompts of all lengths."""
    rng = np.random.default_rng(5)
    prompts = [tuple(rng.integers(2, 48, size=3 + 5 * i % 17).tolist()) for i in range(-(-count // alike))]
    return [Request(prompts[i // alike], 1000 + i, temperature, new) for i in range(count)]


def assert_seeded(model: PreTrainedModel, asked: list[Request], done: list[Completion | None]) -> None:
    """Every token is the one that the seed gives, but for near-ties: activations are rounded to eight bits."""
    seen = verifier(model).replay([(one, found.ids) for one, found in zip(asked, done, strict=True)])
    margin = np.concatenate([one.margin for one in seen])
    assert (margin > 1e-5).mean() < 0.1
    assert margin.mean() < 0.02
    off = np.concatenate([np.array(found.logp) - one.logp for found, one in zip(done, seen, strict=True)])
    assert np.sqrt((off**2).mean()) < 0.2


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_holds_the_canonical_values(tmp_path: Path, kind: str) -> None:
    model = made(kind)
    file = GgufFile(tmp_path / FILE, config_of(model))
    file.fill(tensors_of(model))
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / FILE).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], 2)
    heads = {"q_proj.weight": 4, "k_proj.weight": 2} if kind == "llama" else {}
    for name, tensor in tensors_of(model):
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        found = read.pop(names.get_name(name, (".weight", ".bias")))
        wanted = {True: "F32"}.get(tensor.ndim == 1, "Q4_0" if is_quantised(name, tensor) else "BF16")
        assert found.tensor_type.name == wanted, name
        values = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type).copy()).bfloat16()
        if count := next((heads[part] for part in heads if name.endswith(part)), 0):
            values = torch.cat([torch.cat([head[::2], head[1::2]]) for head in values.chunk(count)])
        assert torch.equal(values.view(tensor.shape), tensor), name
    assert not read


def test_a_row_that_holds_no_whole_blocks_stays_in_bfloat16(tmp_path: Path) -> None:
    model = made(intermediate_size=80)
    GgufFile(tmp_path / FILE, config_of(model)).fill(tensors_of(model))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / FILE).tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("BF16", "Q4_0")


def test_values_are_those_that_were_filled_in(tmp_path: Path) -> None:
    model = made("llama")
    file = GgufFile(tmp_path / FILE, config_of(model))
    file.fill(tensors_of(model))
    held = dict(tensors_of(model))
    name = "model.layers.1.self_attn.q_proj.weight"
    for part in (Slice(name, 5, 77), Slice("model.norm.weight", 0, 64), Slice("lm_head.weight", 3, 9)):
        wanted = held[part.name].flatten()[part.start : part.stop].view(torch.int16).numpy().tobytes()
        assert file.values([part]) == wanted


@pytest.mark.parametrize("scale", [1e-7, 1e-5, 0.02, 1.0, 1000.0])
def test_blocks_give_back_the_canonical_values_whatever_their_size(scale: float) -> None:
    weight = (torch.randn(24, 256, generator=torch.Generator().manual_seed(3)) * scale).bfloat16()
    weight[3] = 0
    canonical = quantise(weight, "int4")
    assert torch.equal(unpacked(packed(canonical)), canonical)


@pytest.mark.parametrize("quantiser", ["", "int8", "fp8"])
def test_weights_that_int4_did_not_make_are_refused(tmp_path: Path, quantiser: str) -> None:
    model = made()
    file = GgufFile(tmp_path / FILE, config_of(model))
    with pytest.raises(WeightsError, match=r"q_proj\.weight holds values that the quantiser int4 does not make"):
        file.fill(tensors_of(model, quantiser))


def test_a_tensor_that_is_missing_strange_or_there_twice_is_refused(tmp_path: Path) -> None:
    model = made()
    file, whole = GgufFile(tmp_path / FILE, config_of(model)), tensors_of(model)
    with pytest.raises(WeightsError, match="1 tensors are missing"):
        file.fill([one for one in whole if one[0] != "model.norm.weight"])
    with pytest.raises(WeightsError, match="came twice"):
        file.fill([*whole, whole[-2]])
    with pytest.raises(WeightsError, match="unknown to this model"):
        file.fill([*whole, ("other", torch.zeros(3))])
    with pytest.raises(WeightsError, match="tied to another one"):
        file.fill([*whole[:-1], ("lm_head.weight", whole[0][1] + 1)])


def test_an_architecture_that_is_not_written_is_refused_by_its_name(tmp_path: Path) -> None:
    gemma = Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, head_dim=16))
    with pytest.raises(ConfigError, match="has llama, qwen2, qwen3, not gemma3_text; join with --engine torch"):
        GgufFile(tmp_path / FILE, config_of(gemma))


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'silu' alone, this model has 'gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias = False alone"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "use_sliding_window"),
        ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type"),
        ("qwen3", {"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ("qwen3", {"max_position_embeddings": -3}, "max_position_embeddings"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path: Path, kind: str, changes: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        GgufFile(tmp_path / FILE, config_of(made(kind, **changes)))


@pytest.mark.parametrize("package", ["gguf", "llama_cpp"])
def test_a_missing_package_is_said_with_the_way_to_mend_it(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"package {package}.*farflung\[llama-cpp\]"):
        own_llama_cpp("cpu")


# --- the engine ------------------------------------------------------------------------------------------------------


@needs_llama_cpp
@pytest.mark.parametrize("kind", KINDS)
def test_its_texts_are_those_of_the_seeds(make, kind: str) -> None:
    model, asked = made(kind), requests(40)
    engine = make(model, max_rows=7)
    done = engine.generate(asked)
    assert_seeded(model, asked, done)
    assert all(len(one.ids) == 12 or one.ids[-1] == 1 for one in done)
    assert engine.made > 12
    alone = [engine.generate([one])[0] for one in asked[:6]]
    assert sum(one.ids == other.ids for one, other in zip(alone, done, strict=False)) >= 4
    engine.close()


@needs_llama_cpp
def test_it_follows_greedily_at_other_temperatures_and_differs_without_the_seed(make) -> None:
    model = made()
    engine = make(model)
    for temperature in (0.0, 0.7):
        asked = requests(24, temperature=temperature)
        assert_seeded(model, asked, engine.generate(asked))
    asked = requests(24)
    others = [Request(one.prompt_ids, one.seed + 7, 1.0, 12) for one in asked]
    with pytest.raises(AssertionError):
        assert_seeded(model, asked, engine.generate(others))
    engine.close()


@needs_llama_cpp
def test_it_stops_at_end_tokens_stop_strings_and_when_it_is_told_to(make) -> None:
    moves = np.zeros((1, 48), np.uint8)
    moves[0, 9:20] = DONE
    engine = make(made(), stops=Stops(moves))
    done = engine.generate(requests(30))
    assert any(9 <= one.ids[-1] < 20 for one in done)
    assert not any(1 in one.ids[:-1] or any(9 <= token < 20 for token in one.ids[:-1]) for one in done)
    asked = iter([False, False, True])
    left = engine.generate(requests(8), lambda: next(asked))
    assert None in left
    assert all(one is None or len(one.ids) <= 2 for one in left)
    assert engine.generate([]) == []
    engine.close()


@needs_llama_cpp
def test_another_version_replaces_the_first_and_a_broken_one_leaves_none(make) -> None:
    first, second, asked = made(seed=1), made(seed=2), requests(12)
    engine = make(first)
    assert_seeded(first, asked, engine.generate(asked))
    engine.load(tensors_of(second))
    assert_seeded(second, asked, engine.generate(asked))
    with pytest.raises(WeightsError, match="missing"):
        engine.load(tensors_of(first)[:3])
    with pytest.raises(WeightsError, match="no complete weights"):
        engine.generate(asked)
    engine.load(tensors_of(first))
    assert_seeded(first, asked, engine.generate(asked))
    part = Slice("model.embed_tokens.weight", 0, 40)
    assert engine.values([part]) == tensors_of(first)[0][1].flatten()[:40].view(torch.int16).numpy().tobytes()
    with pytest.raises(ConfigError, match="does not replay"):
        engine.replay([(asked[0], (3,))])
    engine.close()


@needs_llama_cpp
def test_long_prompts_are_read_in_parts(make) -> None:
    model = made(max_position_embeddings=4096)
    rng = np.random.default_rng(9)
    asked = [Request(tuple(rng.integers(2, 48, size=size).tolist()), size, 1.0, 6) for size in (900, 1300, 20, 700)]
    engine = make(model)
    assert_seeded(model, asked, engine.generate(asked))
    engine.close()


# --- its profile -----------------------------------------------------------------------------------------------------


def numerics(**changes: object) -> Numerics:
    fields = {"engine": "llama.cpp", "device": "cpu", "arithmetic": "float32", "bits": 4, "quantiser": "int4"}
    return Numerics(**fields | changes)


OWN = Own("llama.cpp", "cpu", "float32", 4)


def test_a_node_takes_the_profile_that_was_measured_with_it_and_no_other() -> None:
    torch_int4, whole = numerics(engine="torch"), numerics(bits=32, quantiser="")
    run = SimpleNamespace(profiles={"a": torch_int4, "b": whole, "c": numerics()}, profile="a")
    assert choose(run, OWN) == "c"
    for others in ({"a": torch_int4}, {"b": whole}, {"d": numerics(quantiser="int8", bits=8)}):
        with pytest.raises(ConfigError, match=r"calibrate MODEL --device cpu --engine llama\.cpp --quantiser int4"):
            choose(SimpleNamespace(profiles=others, profile="a"), OWN)
    assert choose(run, Own("torch", "cpu"), "a") == "a"


@needs_llama_cpp
def test_calibration_measures_int4_alone_on_the_processor() -> None:
    assert numerics_of("cpu", engine="llama.cpp") == numerics()
    assert name_of(numerics()) == "llama.cpp-cpu-fp32-int4"
    with pytest.raises(ConfigError, match="leave out --arithmetic and --quantiser"):
        numerics_of("cpu", quantiser="int8", engine="llama.cpp")
    with pytest.raises(ConfigError, match="has the processor alone"):
        own_llama_cpp("cuda:1")


@needs_llama_cpp
def test_a_profile_is_made_with_it(tmp_path: Path) -> None:
    model = made("llama", vocab_size=32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, tmp_path)
    model.save_pretrained(tmp_path)
    profile = write_profile(str(tmp_path), "", tmp_path / "few.json", None, tokens=600, threads=1, engine="llama.cpp")
    assert profile.fields == numerics().fields
    assert profile.verified_in == ("float32",)
    assert profile.honest.tokens > 600
    assert sum(profile.honest.flips) < 0.1 * profile.honest.tokens
    assert profile.noise > 1e-4
    assert profile.power["unseeded"] > 0.05


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def version(name: str) -> str:
        if name == "llama-cpp-python":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor, "version", version)

    async def found() -> list[doctor.Finding]:
        return [one async for one in doctor.examine("", tmp_path, None, WorkerSection(engine="llama.cpp"))]

    (one,) = [one for one in asyncio.run(found()) if one.what == "llama.cpp"]
    assert (one.is_well, one.mend) == (False, "pip install 'farflung[llama-cpp]'")
