"""MLX as the engine: tokens, log-probabilities, weights and refusals are those of the embedded engine."""

import asyncio
import itertools
import json
import threading
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
mx = pytest.importorskip("mlx.core", reason="MLX is not installed: pip install 'farflung[mlx]'")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install 'farflung[mlx]'")

from farflung.config import WorkerSection  # noqa: E402
from farflung.engine import mlx_noise, noise, of_node  # noqa: E402
from farflung.engine.base import Request  # noqa: E402
from farflung.engine.local import LocalEngine  # noqa: E402
from farflung.engine.mlx import MlxEngine  # noqa: E402
from farflung.engine.mlx_model import TRIED, in_mlx, in_torch  # noqa: E402
from farflung.envs.sums import Sums  # noqa: E402
from farflung.ops import calibrate, doctor  # noqa: E402
from farflung.ops.machine import device, measured  # noqa: E402
from farflung.protocol.errors import ConfigError, WeightsError  # noqa: E402
from farflung.protocol.probe import Slice  # noqa: E402
from farflung.protocol.stops import DONE, Stops  # noqa: E402
from farflung.tasks.create_run import Model  # noqa: E402

BASE = Path(__file__).parents[2] / "examples" / "base"
NEAR, DECIDED = 1e-4, 1e-3
SMALL = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
ROPE = {"rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}
MODELS: dict[str, tuple[str, dict]] = {
    "gemma3_text": ("Gemma3", {"sliding_window": 8, "num_hidden_layers": 6}),
    "granite": ("Granite", GRANITE),
    "llama": ("Llama", {}),
    "llama, tied, turned otherwise": ("Llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 500.0}}),
    "llama, linear": ("Llama", {"rope_parameters": ROPE | {"rope_type": "linear"}}),
    "llama, llama3": ("Llama", {"rope_parameters": ROPE | LLAMA3 | {"rope_type": "llama3"}}),
    "llama, yarn": (
        "Llama",
        {"rope_parameters": ROPE | {"rope_type": "yarn", "original_max_position_embeddings": 64}},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
}
CONFIGS = {"Gemma3": "Gemma3Text"}


def model_of(kind: str, changes: dict) -> object:
    torch.manual_seed(0)
    config = getattr(transformers, f"{CONFIGS.get(kind, kind)}Config")(**(SMALL | changes))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for one in model.parameters():
        if one.ndim == 1:
            torch.nn.init.normal_(one, 0.3, 0.3)
    return model


def config_of(model) -> bytes:
    return model.config.to_json_string(use_diff=False).encode()


def weights_of(model) -> list[tuple[str, torch.Tensor]]:
    return [*model.state_dict().items()]


def mlx_of(model, dtype=torch.float32, **options) -> MlxEngine:
    engine = MlxEngine(config_of(model), dtype=dtype, **options)
    engine.load(weights_of(model))
    return engine


def asked(new: int = 16) -> list[Request]:
    """Prompts of many lengths, two alike, longer than a window too; sampled hot and cold, and greedy."""
    rng = np.random.default_rng(5)
    shapes = [(1, 1.0), (5, 1.0), (9, 1.0), (14, 1.0), (20, 1.0), (20, 0.7), (3, 0.0), (1, 1.3)]
    found = [
        Request(tuple(rng.integers(2, 32, size).tolist()), int(rng.integers(1 << 53)), temperature, new)
        for size, temperature in shapes
    ]
    return [*found, replace(found[4], seed=7)]


def agree(own, theirs, replays, near: float = NEAR) -> int:
    """Refuse other tokens up to the first that rounding may change, and other log-probabilities; how many were seen."""
    seen = 0
    for mine, his, replay in zip(own, theirs, replays, strict=True):
        assert not replay.margin[replay.gap > DECIDED].any()
        np.testing.assert_allclose(mine.logp, replay.logp, atol=near, rtol=0)
        close = np.flatnonzero(replay.gap <= DECIDED)
        decided = int(close[0]) if len(close) else len(mine.ids)
        assert mine.ids[:decided] == his.ids[:decided]
        seen += decided
    return seen


def test_every_kind_that_it_takes_is_tried_here() -> None:
    assert {kind.partition(",")[0] for kind in MODELS} == set(TRIED)


@pytest.mark.parametrize("kind", MODELS)
def test_text_and_log_probabilities_are_those_of_the_embedded_engine(kind: str) -> None:
    model = model_of(*MODELS[kind])
    local, engine, requests = LocalEngine(model, eos_ids=()), mlx_of(model, eos_ids=()), asked()
    made = engine.generate(requests)
    items = [(request, one.ids) for request, one in zip(requests, made, strict=True)]
    assert agree(made, local.generate(requests), local.replay(items)) > 130
    alone = [engine.generate([request])[0] for request in requests[::4]]
    assert [one.ids for one in alone] == [one.ids for one in made[::4]]
    for own, theirs in zip(engine.replay(items), local.replay(items), strict=True):
        for name in ("gap", "margin", "pick", "lead", "logp"):
            np.testing.assert_allclose(getattr(own, name), getattr(theirs, name), atol=NEAR, rtol=0)


def test_in_batches_of_few_rows_the_text_is_the_same_and_long_prompts_are_read_in_parts(
    tiny_qwen, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, requests = mlx_of(tiny_qwen()), asked()
    whole = engine.generate(requests)
    monkeypatch.setattr("farflung.engine.mlx.PREFILL", 7)
    engine.max_rows = 2
    assert [one.ids for one in engine.generate(requests)] == [one.ids for one in whole]


def test_bfloat16_is_near_the_embedded_engine_and_its_logits_are_not_rounded(tiny_qwen) -> None:
    for model in (tiny_qwen(), model_of(*MODELS["gemma3_text"]), model_of(*MODELS["llama"])):
        half = model.to(torch.bfloat16)
        engine, requests = mlx_of(half, torch.bfloat16, eos_ids=()), asked()
        items = [(request, one.ids) for request, one in zip(requests, engine.generate(requests), strict=True)]
        logits = engine._model.compute(mx.array([[3, 4, 5]]))
        assert logits.dtype == mx.float32
        assert not mx.array_equal(logits, logits.astype(mx.bfloat16).astype(mx.float32))
        replays = LocalEngine(half.float(), eos_ids=()).replay(items)
        flipped = np.concatenate([one.margin > 0 for one in replays])
        margin = np.concatenate([one.margin for one in replays])
        assert flipped.mean() < 0.1
        assert margin.max() < 0.5


def test_a_load_changes_the_text_and_another_thread_reads_the_same(tiny_qwen) -> None:
    engine, requests = mlx_of(tiny_qwen(0)), asked()
    first = engine.generate(requests)
    found: list = []

    def elsewhere() -> None:
        engine.load(weights_of(tiny_qwen(1)))
        found.append(engine.generate(requests))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found[0] == engine.generate(requests) == mlx_of(tiny_qwen(1)).generate(requests)
    assert [one.ids for one in first] != [one.ids for one in found[0]]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda given: given[:-1], "missing from the weights"),
        (lambda given: [*given, given[0]], "came twice"),
        (lambda given: [*given, ("model.other", torch.zeros(2))], "unknown to this model"),
        (lambda given: [(given[0][0], given[0][1][:-1]), *given[1:]], "has shape"),
        (lambda given: [(given[0][0], given[0][1].int()), *given[1:]], "of type"),
    ],
)
def test_other_tensors_than_the_models_are_refused_and_then_it_does_not_work(spoil, said: str) -> None:
    engine = mlx_of(model_of(*MODELS["llama"]))
    with pytest.raises(WeightsError, match=said):
        engine.load(spoil(weights_of(model_of(*MODELS["llama"]))))
    for work in (engine.generate, engine.replay, engine.values):
        with pytest.raises(WeightsError, match="no complete weights"):
            work([])


def test_a_tied_head_may_come_by_either_name_or_both_if_they_agree(tiny_qwen) -> None:
    model, requests = tiny_qwen(), asked()
    given = dict(weights_of(model))
    said = mlx_of(model).generate(requests)
    for left_out in ("lm_head.weight", "model.embed_tokens.weight"):
        engine = MlxEngine(config_of(model))
        engine.load((name, one) for name, one in given.items() if name != left_out)
        assert engine.generate(requests) == said
    with pytest.raises(WeightsError, match="is tied to another one"):
        engine.load((given | {"lm_head.weight": given["lm_head.weight"] + 1}).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_the_embedded_engine(tiny_qwen, dtype) -> None:
    model = tiny_qwen().to(dtype)
    slices = [Slice("model.layers.1.mlp.up_proj.weight", 5, 70), Slice("lm_head.weight", 0, 9)]
    slices += [Slice("model.embed_tokens.weight", 100, 164), Slice("model.norm.weight", 0, 64)]
    engine = mlx_of(model, dtype)
    assert engine.values(slices) == LocalEngine(model).values(slices)
    with pytest.raises(WeightsError, match=r"no tensor model\.other"):
        engine.values([Slice("model.other", 0, 1)])


def test_texts_end_with_end_tokens_and_stop_strings(tiny_qwen) -> None:
    model, requests = tiny_qwen(), asked(60)
    free = mlx_of(model, eos_ids=()).generate(requests)
    ended = mlx_of(model).generate(requests)
    for one, whole in zip(ended, free, strict=True):
        until = whole.ids.index(1) + 1 if 1 in whole.ids else 60
        assert one.ids == whole.ids[:until]
    assert any(len(one.ids) < 60 for one in ended)
    moves = np.zeros((2, 32), np.uint8)
    moves[0, 4:8], moves[1, 4:8] = 1, DONE
    stops = Stops(moves)
    stopped = mlx_of(model, eos_ids=(), stops=stops).generate(requests)
    for one, whole in zip(stopped, free, strict=True):
        assert one.ids == whole.ids[: stops.end(whole.ids) or 60]
    assert any(len(one.ids) < 60 for one in stopped)


def test_made_rises_and_generation_ends_when_it_is_told_to(tiny_qwen) -> None:
    engine, requests = mlx_of(tiny_qwen(), eos_ids=()), asked()
    short = [replace(requests[0], max_new_tokens=3), *requests[1:]]
    left = iter([False] * 5)
    done = engine.generate(short, lambda: next(left, True))
    assert [one is not None for one in done] == [True, *[False] * 8]
    assert engine.made == 6


def test_requests_and_ids_that_the_model_does_not_have_are_refused(tiny_qwen) -> None:
    engine = mlx_of(tiny_qwen())
    for wrong in (
        Request((), 1, 1.0, 4),
        Request((3,), 1, 1.0, 0),
        Request((3, 32), 1, 1.0, 4),
        Request((-1,), 1, 1.0, 4),
    ):
        with pytest.raises(ValueError, match=r"needs a prompt|no prompt or token ids outside"):
            engine.generate([wrong])
    with pytest.raises(ValueError, match="token ids outside"):
        engine.replay([(Request((3,), 1, 1.0, 4), [99])])
    assert engine.generate([]) == []
    assert len(engine.replay([(Request((3,), 1, 1.0, 4), [])])[0].gap) == 0


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("Gemma", {}, "not 'gemma'"),
        ("Llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("Mistral", {"sliding_window": 8}, "no sliding windows in mistral"),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "no sliding windows"),
        ("Qwen3", {"attention_bias": True}, "self_attn.q_proj.bias"),
        ("Gemma3", {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}, "this order"),
        (
            "Gemma3",
            {"sliding_window": 8, "num_hidden_layers": 6, "hidden_size": 80},
            "8.9375 where 8.9443 is right in float32",
        ),
        ("Llama", {"rope_parameters": ROPE | {"rope_type": "dynamic"}}, "not 'dynamic'"),
        ("Phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "turns whole heads"),
    ],
)
def test_a_model_that_mlx_lm_computes_otherwise_is_refused(kind: str, changes: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        MlxEngine(config_of(model_of(kind, changes)))


def test_noise_is_that_of_every_engine() -> None:
    rng = np.random.default_rng(3)
    seeds = [0, 1, -1, 2**53 - 1, 2**63, *rng.integers(0, 2**53, 60).tolist()]
    positions = [0, 1, 2**31, *rng.integers(0, 1 << 20, 62).tolist()]
    states = noise.row_states(seeds, positions)
    hashed = mlx_noise.bits(states, 50_000)
    np.testing.assert_array_equal(np.array(hashed), noise.bits_numpy(seeds, positions, 50_000))
    made = np.array(mlx_noise.gumbel(states, 50_000))
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, noise.gumbel(seeds, positions, 50_000).numpy(), atol=2e-6, rtol=0)


def test_noise_is_that_of_the_fixed_vectors() -> None:
    vectors = json.loads((Path(__file__).parents[1] / "data" / "noise_vectors.json").read_text())
    for one in vectors:
        state = noise.row_states([one["seed"]], [one["position"]])
        assert mlx_noise.bits(state, one["token"] + 1)[0, -1].item() == one["hash"]
        assert mlx_noise.gumbel(state, one["token"] + 1)[0, -1].item() == pytest.approx(one["gumbel"], abs=3e-6)


def test_numbers_go_between_torch_and_mlx_unchanged() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensor = torch.randn(5, 7).to(dtype).t()
        assert torch.equal(in_torch(in_mlx(tensor)), tensor)


@pytest.mark.parametrize("quantiser", ["", "int8"])
def test_a_profile_is_measured_for_it(quantiser: str) -> None:
    model = Model(str(BASE))
    prompts = [tuple(model.prompt_ids(Sums().prompt(task))) for task in itertools.islice(Sums().tasks("train"), 64)]
    under = calibrate.Conditions(model, prompts, temperature=2.0, max_new_tokens=16)
    numerics = calibrate.numerics_of("cpu", quantiser=quantiser, engine="mlx")
    options = {"tokens": 2000, "threads": 1, "kinds": calibrate.KINDS[:1], "cheats": ("unseeded",)}
    found = calibrate.make_profile(under, calibrate.name_of(numerics), numerics, **options)
    assert found.name == ("mlx-cpu-fp32-int8" if quantiser else "mlx-cpu-fp32")
    assert found.holds_published
    assert found.power["unseeded"] > 0
    assert 0 < found.noise < 1e-5


def test_the_doctor_says_what_is_there_or_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.EXTRAS["mlx"]().text == f"{version('mlx')}, mlx-lm {version('mlx-lm')}"
    assert device(WorkerSection(engine="mlx", device="cpu"))
    monkeypatch.setattr(doctor, "version", missing)
    assert (doctor.EXTRAS["mlx"]().is_well, doctor.EXTRAS["mlx"]().mend) == (False, "pip install 'farflung[mlx]'")


def missing(name: str) -> str:
    raise PackageNotFoundError(name)


def test_a_node_picks_it_by_its_settings(tiny_qwen, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = WorkerSection(engine="mlx", device="cpu")
    own = asyncio.run(of_node.own_numerics(settings))
    assert own == ("mlx", "cpu", "", 0)
    info = SimpleNamespace(eos_ids=(1,), vocab=32)
    place = of_node.Place(settings, info, torch.device("cpu"), tmp_path, 5)
    made = of_node.make(place, config_of(tiny_qwen()), torch.float32, None)
    assert isinstance(made, MlxEngine)
    assert (made.max_rows, made.eos_ids) == (5, {1})
    assert measured(made, 5) > 0
    with pytest.raises(ConfigError, match="not on cuda:0"):
        of_node.mlx_numerics(torch.device("cuda:0"))
    monkeypatch.setattr(of_node, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'farflung\[mlx\]'"):
        asyncio.run(of_node.own_numerics(settings))
