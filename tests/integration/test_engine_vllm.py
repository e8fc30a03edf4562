"""The vLLM engine: against a stand-in that speaks vLLM's routes, and against a real server where one is named.

    FARFLUNG_VLLM_URL=http://127.0.0.1:8000 FARFLUNG_VLLM_MODEL=models/smollm2-135m pytest -k real_server

The real server holds other weights afterwards.
"""

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402
from tests.integration.test_selftest import made_by  # noqa: E402
from tests.standin import INFO  # noqa: E402

from farflung.audits import self_test  # noqa: E402
from farflung.config import WorkerSection  # noqa: E402
from farflung.engine.base import Replay, Request  # noqa: E402
from farflung.engine.local import LocalEngine  # noqa: E402
from farflung.engine.vllm import VllmEngine  # noqa: E402
from farflung.engine.vllm_answers import server_numerics  # noqa: E402
from farflung.protocol.errors import ConfigError, EngineAway, Unreachable, WeightsError, WrongWeights  # noqa: E402
from farflung.protocol.identity import Key  # noqa: E402
from farflung.protocol.probe import Slice  # noqa: E402
from farflung.protocol.stops import DONE, Stops  # noqa: E402
from farflung.tasks.create_run import admitted  # noqa: E402
from farflung.trust.profiles import load_profile  # noqa: E402
from farflung.worker import Worker  # noqa: E402
from vllm_server import StandIn, vllm_server  # noqa: E402

REAL_URL, REAL_MODEL = os.environ.get("FARFLUNG_VLLM_URL", ""), os.environ.get("FARFLUNG_VLLM_MODEL", "")
VOCAB, WORDS = 32, 500
ASKED = [Request((5, 6, 7 + i), 2**52 + i, 0.8, 6) for i in range(5)]


@pytest.fixture
def server(tiny_qwen) -> Iterator[StandIn]:
    with vllm_server(LocalEngine(tiny_qwen().eval())) as stand_in:
        yield stand_in


@pytest.fixture
def wordy(tiny_qwen) -> Iterator[StandIn]:
    """One whose model has more tokens than it tells of."""
    with vllm_server(LocalEngine(tiny_qwen(vocab_size=WORDS).eval())) as stand_in:
        yield stand_in


@pytest.fixture(params=["stock", "processor"])
def either(server: StandIn, request: pytest.FixtureRequest) -> StandIn:
    """A server whose own noise is the run's, and one that needs our processor for it."""
    server.sampler.has_processor = request.param == "processor"
    server.flaws.noise = "another" if server.sampler.has_processor else "seeded"
    return server


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}


@pytest.fixture
def engine(server: StandIn, tmp_path: Path) -> VllmEngine:
    return VllmEngine(server.url, tmp_path, eos_ids=server.engine.eos_ids, vocab=VOCAB, max_rows=2)


def test_it_generates_what_the_seeds_say_in_order(either: StandIn, engine: VllmEngine) -> None:
    engine.load(tensors(either.engine.model).items())
    asked = [*ASKED, Request((3, 4), 0, 0.0, 5)]
    for found, expected in zip(engine.generate(asked), either.engine.generate(asked), strict=True):
        assert found is not None
        assert expected is not None
        assert found.ids == expected.ids
    at_one = [Request(one.prompt_ids, one.seed, 1.0, 6) for one in ASKED]
    for found, expected in zip(engine.generate(at_one), either.engine.generate(at_one), strict=True):
        assert found.logp == pytest.approx(expected.logp, abs=1e-4), "vLLM tells those at temperature 1"


def test_stop_strings_end_in_the_server_where_one_token_has_them_and_else_here(server: StandIn, tmp_path: Path) -> None:
    moves = np.zeros((2, 32), np.uint8)
    moves[0, 4:12], moves[1, 4:12], moves[:, 20] = 1, DONE, DONE
    stops, local = Stops(moves), server.engine
    asked = [Request((3, 4, seed % 32), seed, 1.0, 30) for seed in range(12)]
    expected = LocalEngine(local.model, eos_ids=local.eos_ids, stops=stops).generate(asked)
    engine = VllmEngine(server.url, tmp_path, eos_ids=local.eos_ids, vocab=VOCAB, stops=stops)
    engine.load(tensors(local.model).items())
    assert [one.ids for one in engine.generate(asked)] == [one.ids for one in expected]
    assert local.eos_ids == {1, 20}, "the server was told of the token that is a stop string by itself"
    assert {20} < {one.ids[-1] for one in expected}, "both kinds of ends are there"


def test_weights_are_swapped_and_shown(server: StandIn, engine: VllmEngine) -> None:
    held = tensors(server.engine.model)
    engine.load((name, value * 1.5) for name, value in held.items())
    assert all(torch.equal(server.engine.model.state_dict()[name], value * 1.5) for name, value in held.items())
    name = next(iter(held))
    expected = (held[name] * 1.5).flatten()[3:9].bfloat16().view(torch.int16).numpy().tobytes()
    assert engine.values([Slice(name, 3, 9)]) == expected


def test_nothing_is_done_before_weights_are_loaded(engine: VllmEngine) -> None:
    with pytest.raises(WeightsError, match="load all tensors"):
        engine.generate(ASKED)
    with pytest.raises(WeightsError, match="load all tensors"):
        engine.values([])


def test_a_tensor_that_comes_twice_is_refused(server: StandIn, engine: VllmEngine) -> None:
    one = next(iter(tensors(server.engine.model).items()))
    with pytest.raises(WeightsError, match="twice"):
        engine.load([one, one])


def test_a_server_that_was_started_again_is_noticed(server: StandIn, engine: VllmEngine) -> None:
    engine.load(tensors(server.engine.model).items())
    server.label = "default"
    with pytest.raises(WrongWeights, match="default"):
        engine.generate(ASKED)


def test_a_completion_that_the_server_cuts_short_is_refused(server: StandIn, engine: VllmEngine) -> None:
    engine.load(tensors(server.engine.model).items())
    server.longest = 1
    with pytest.raises(ConfigError, match="max-model-len"):
        engine.generate(ASKED)


def test_stopping_leaves_what_is_under_way(server: StandIn, engine: VllmEngine) -> None:
    engine.load(tensors(server.engine.model).items())
    server.delay_s = 1.0
    asked_at = time.monotonic()
    assert engine.generate(ASKED, lambda: time.monotonic() > asked_at + 0.2) == [None] * len(ASKED)
    assert time.monotonic() < asked_at + 0.9


def test_a_request_that_fails_costs_itself_alone(server: StandIn, engine: VllmEngine) -> None:
    engine.load(tensors(server.engine.model).items())
    expected = engine.generate(ASKED)
    server.breaks = {tuple(ASKED[1].prompt_ids)}
    found = engine.generate(ASKED)
    broken = [request.prompt_ids in server.breaks for request in ASKED]
    assert 0 < sum(broken) < len(broken)
    assert [one is None for one in found] == broken
    assert all(one is None or one.ids == other.ids for one, other in zip(found, expected, strict=True))
    server.breaks = {request.prompt_ids for request in ASKED}
    with pytest.raises(EngineAway, match="failed at a request"):
        engine.generate(ASKED)


def test_a_server_that_dies_in_the_middle_costs_what_was_under_way(server: StandIn, engine: VllmEngine) -> None:
    engine.load(tensors(server.engine.model).items())
    server.hangs_up_after = 2
    found = engine.generate(ASKED)
    assert sum(one is not None for one in found) == 2
    with pytest.raises(EngineAway, match="does not answer"):
        engine.generate(ASKED)
    server.hangs_up_after = None
    assert all(engine.generate(ASKED)), "once it is back, all goes on"


def test_it_reads_a_text_by_what_the_server_tells(either: StandIn, engine: VllmEngine) -> None:
    """Most tokens of the tiny vocabulary are told of, so that its view is the local engine's but for the rest."""
    engine.load(tensors(either.engine.model).items())
    asked = [Request(one.prompt_ids, one.seed, 1.0, 6) for one in ASKED]
    items = [(one, [3, 4, 5, 6]) for one in asked]
    for found, expected in zip(engine.replay(items), either.engine.replay(items), strict=True):
        for one, other in zip(vars_of(found), vars_of(expected), strict=True):
            assert np.isclose(one, other, atol=1e-3).mean() >= 0.75
        assert np.allclose(found.logp, expected.logp, atol=1e-4)


def vars_of(replay: Replay) -> list[np.ndarray]:
    return [replay.gap, replay.margin, replay.pick, replay.lead]


def test_a_server_where_nobody_may_load_is_refused(server: StandIn, tmp_path: Path) -> None:
    server.is_developing = False
    with pytest.raises(ConfigError, match="nobody load weights"):
        VllmEngine(server.url, tmp_path, eos_ids=[1], vocab=VOCAB)


def test_a_server_that_is_not_there_is_said_to_be_unreachable(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="no vLLM answers"):
        VllmEngine("http://127.0.0.1:9", tmp_path, eos_ids=[1], vocab=VOCAB)


# --- servers that sample in another way ------------------------------------------------------------------------------

WRONG = {
    "seeds ignored": ({"noise": "ignored"}, "ignores the seeds"),
    "first runner": ({"noise": "another"}, "samples with another noise"),
    "watermark, untold": ({"noise": "watermarked"}, "samples with another noise"),
    "speculation, untold": ({"noise": "speculative"}, "samples with another noise"),
    "temperature of generation_config": ({"temperature": 0.6}, "another temperature than asked"),
    "top-k": ({"top_k": 5}, "likeliest tokens only"),
    "top-p": ({"top_p": 0.8}, "likeliest tokens only"),
    "penalty": ({"penalty": 30.0}, "penalises tokens that came before"),
    "16-bit head": ({"head": torch.bfloat16}, "head_dtype"),
    "prefixes kept": ({"keeps_prefixes": True}, "prefixes of the weights before"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_server_that_samples_otherwise_gets_no_rollout(wordy: StandIn, tmp_path: Path, name: str) -> None:
    flaws, words = WRONG[name]
    vars(wordy.flaws).update(flaws)
    held = tensors(wordy.engine.model)
    engine = VllmEngine(wordy.url, tmp_path, eos_ids=[1], vocab=WORDS)
    with pytest.raises(ConfigError, match=words):
        engine.load((key, value * 1.3) for key, value in held.items())
    with pytest.raises(WeightsError):
        engine.generate(ASKED)
    assert wordy.rollouts == 0


@pytest.mark.parametrize(
    ("setting", "words"), [("speculative_config", "speculatively"), ("watermark_config", "waterm")]
)
def test_what_a_server_tells_of_itself_is_believed(server: StandIn, tmp_path: Path, setting: str, words: str) -> None:
    server.settings = {setting: {"method": "ngram"}}
    engine = VllmEngine(server.url, tmp_path, eos_ids=[1], vocab=VOCAB)
    with pytest.raises(ConfigError, match=words):
        engine.load(tensors(server.engine.model).items())


def test_a_right_server_passes_at_every_load(wordy: StandIn, tmp_path: Path) -> None:
    held = {name: value.clone() for name, value in tensors(wordy.engine.model).items()}
    engine = VllmEngine(wordy.url, tmp_path, eos_ids=[1], vocab=WORDS)
    for factor in (1.0, 1.01, 0.5, 2.0, 1.0):
        engine.load((name, value * factor) for name, value in held.items())
    assert all(engine.generate(ASKED))


def test_a_server_with_another_model_or_its_old_weights_is_told_by_the_self_test(
    server: StandIn, engine: VllmEngine, tiny_qwen
) -> None:
    """It samples as it should, from the wrong policy."""
    test = made_by(LocalEngine(tiny_qwen(seed=1).eval()))
    right = {name: value.clone() for name, value in tensors(tiny_qwen(seed=1)).items()}
    server.flaws.keeps_weights = True
    engine.load(right.items())
    tried = self_test.attempt(engine, test, load_profile("torch-cpu-bf16"))
    assert tried is not None
    assert not tried.is_forgiven
    assert "may hold other weights" in tried.text
    server.flaws.keeps_weights = False
    engine.load(right.items())
    tried = self_test.attempt(engine, test, load_profile("torch-cpu-bf16"))
    assert tried is not None
    assert tried.is_forgiven


def test_a_fault_that_comes_with_a_restart_is_told_too(wordy: StandIn, tmp_path: Path) -> None:
    engine = VllmEngine(wordy.url, tmp_path, eos_ids=[1], vocab=WORDS)
    engine.load(tensors(wordy.engine.model).items())
    wordy.start_again()
    wordy.flaws.top_k = 5
    with pytest.raises(WrongWeights):
        engine.generate(ASKED)
    with pytest.raises(ConfigError, match="likeliest"):
        engine.load(tensors(wordy.engine.model).items())


# --- a real server ---------------------------------------------------------------------------------------------------


CPU = {"model_config": {"dtype": "float32"}, "device_config": {"device_type": "cpu"}}
BFLOAT = {"model_config": {"dtype": "torch.bfloat16", "quantization": None}, "device_config": {"device_type": "cuda"}}


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        (BFLOAT, ("vllm", "cuda", "bfloat16", 16)),
        (
            {"model_config": {"dtype": "float32"}, "device_config": {"device_type": "cpu"}},
            ("vllm", "cpu", "float32", 32),
        ),
        (BFLOAT | {"model_config": {"dtype": "torch.bfloat16", "quantization": "fp8"}}, ("vllm", "cuda", "fp8", 8)),
        (BFLOAT | {"cache_config": {"cache_dtype": "fp8_e4m3"}}, ("vllm", "cuda", "fp8", 16)),
        (BFLOAT | {"model_config": {"dtype": "torch.float16", "quantization": "awq"}}, ("vllm", "cuda", "", 0)),
        (None, ("vllm", "", "", 0)),
        ("nonsense", ("vllm", "", "", 0)),
        ({"model_config": {"dtype": 7}, "device_config": []}, ("vllm", "", "", 0)),
    ],
)
def test_a_server_says_what_it_computes_in(server: StandIn, settings: Any, own: tuple[Any, ...]) -> None:
    server.settings = settings
    assert server_numerics(f"{server.url}/") == own


def test_a_worker_takes_the_profile_of_its_server_and_is_not_judged_by_another(server: StandIn, tmp_path: Path) -> None:
    """The run's own profile is for torch on CPUs; a worker that named none was judged by it, and ejected."""
    own = load_profile("torch-cpu-fp32")
    of_server = {"engine": "vllm", "device": "cuda", "arithmetic": "bfloat16", "bits": 16}
    served = msgspec.structs.replace(own, name="v", **of_server)
    server.settings = BFLOAT
    worker = Worker("http://h:1", Key.make(), tmp_path, WorkerSection(engine="vllm", engine_url=server.url))
    worker.own = asyncio.run(worker._own())
    both = {one.name: admitted(one) for one in (own, served)}
    assert worker._profile(msgspec.structs.replace(INFO, profile=own.name, profiles=both)) == "v"
    with pytest.raises(ConfigError, match="no numerics profile for vllm on cuda in bfloat16"):
        worker._profile(msgspec.structs.replace(INFO, profile=own.name, profiles={own.name: admitted(own)}))


@pytest.mark.timeout(900)
@pytest.mark.skipif(not (REAL_URL and REAL_MODEL), reason="FARFLUNG_VLLM_URL and FARFLUNG_VLLM_MODEL name no server")
def test_a_real_server_passes_replay_before_and_after_a_swap(tmp_path: Path) -> None:
    first = {name: value.bfloat16() for name, value in load_file(Path(REAL_MODEL) / "model.safetensors").items()}
    made = torch.Generator().manual_seed(1)
    second = {n: (t.float() * (1 + 0.05 * torch.randn(t.shape, generator=made))).bfloat16() for n, t in first.items()}
    verifier = LocalEngine.from_folder(REAL_MODEL, threads=1)
    engine = VllmEngine(REAL_URL, tmp_path, eos_ids=[2, 0], vocab=verifier.model.config.vocab_size)
    asked = [Request((504, 253, 357 + i % 3), 2**53 - 1 - i, (1.0, 0.7)[i % 2], 8 + i % 5) for i in range(24)]

    def flips(weights: dict[str, torch.Tensor]) -> float:
        verifier.load(weights.items())
        items = [(request, item.ids) for request, item in zip(asked, said, strict=True) if item is not None]
        return float(np.concatenate([one.margin > 1e-5 for one in verifier.replay(items)]).mean())

    for weights, other in ((first, second), (second, first)):
        engine.load(weights.items())
        said = engine.generate(asked)
        assert flips(weights) < 0.15 < 0.2 < flips(other)
