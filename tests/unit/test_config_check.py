"""A config of a few hundred bytes builds no more than this machine allows, and says no in a moment."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from farflung.engine.config_check import metered
from farflung.engine.fit import measure
from farflung.engine.loading import read_config
from farflung.protocol.errors import ConfigError, FarflungError, WeightsError

BASE = Path(__file__).parents[2] / "examples" / "base"
SMALL = json.loads((BASE / "config.json").read_text())


def config(**changes: Any) -> bytes:
    return json.dumps(SMALL | changes).encode()


def test_an_honest_config_is_measured() -> None:
    measure(BASE, torch.float32)
    whole, half = (measure(config(), dtype) for dtype in (torch.float32, torch.bfloat16))
    assert 0 < 4 * whole.parameters == 2 * 2 * half.parameters <= whole.weights_bytes


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_hidden_layers": 10_000}, "num_hidden_layers = 10000"),
        ({"num_hidden_layers": 2**40}, "num_hidden_layers"),
        ({"num_hidden_layers": float("inf")}, "num_hidden_layers"),
        ({"vision_config": {"depth": 10_000}}, "depth = 10000"),
        ({"text_config": {"n_routed_experts": 10**6}}, "n_routed_experts"),
        ({"num_local_experts": 5000}, "num_local_experts"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"time_step_limit": [0.0, float("nan")]}, "time_step_limit = nan"),
        ({"time_step_limit": [{"__float__": "NaN"}, 1.0]}, "time_step_limit = nan"),
        ({"time_step_limit": [float("-inf"), 1.0]}, "time_step_limit = -inf"),
        ({"rope_theta": float("inf")}, "rope_theta = inf"),
        ({"attention_chunks": [0.0, float("inf")]}, "attention_chunks = inf"),
        ({"layer_types": ["full_attention"] * 30_000}, "fields"),
        ({"x": json.loads("[" * 100 + "]" * 100)}, "nested"),
    ],
)
def test_a_config_beyond_all_models_is_refused_before_anything_is_built(changes: dict[str, Any], word: str) -> None:
    since = time.monotonic()
    with pytest.raises(ConfigError, match=word):
        measure(config(**changes), torch.float32)
    assert time.monotonic() - since < 1


SMALL_RANGES = {
    "mamba2": {"hidden_size": 16, "num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2},
    "falcon_h1": {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
                  "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
}  # fmt: skip


@pytest.mark.parametrize("model_type", SMALL_RANGES)
def test_a_range_without_an_upper_end_is_taken_as_transformers_writes_it(model_type: str) -> None:
    sizes = {"num_hidden_layers": 1, "vocab_size": 64, **SMALL_RANGES[model_type]}
    written = AutoConfig.for_model(model_type, **sizes).to_json_string(use_diff=False)
    assert '"__float__": "Infinity"' in written
    plain = json.dumps(read_config(written.encode()))
    assert "Infinity]" in plain
    for text in (written, plain):
        assert read_config(text.encode())["time_step_limit"] == [0.0, float("inf")]
        assert 0 < measure(text.encode(), torch.float32).parameters < 100_000


@pytest.mark.parametrize("depth", [10_000, 500_000])
@pytest.mark.parametrize("brackets", ["[]", '{"a":'])
def test_nested_json_is_one_sentence(depth: int, brackets: str) -> None:
    body = (brackets[:-1] if brackets == "[]" else brackets) * depth
    with pytest.raises(ConfigError, match=r"no readable config\.json|nested"):
        read_config(f'{{"model_type": "llama", "x": {body}'.encode())
    closed = "[" * depth + "]" * depth
    with pytest.raises(ConfigError, match=r"no readable config\.json|nested"):
        read_config(f'{{"model_type": "llama", "x": {closed}}}'.encode())


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 500, "layer_types": None, "hidden_size": 16384, "intermediate_size": 131072},
        {"vocab_size": 2**31 - 1, "hidden_size": 8192},
    ],
)
def test_a_model_too_large_is_refused_while_it_grows(changes: dict[str, Any]) -> None:
    since = time.monotonic()
    with pytest.raises(WeightsError, match="more than any that is known"):
        measure(config(**changes), torch.float32)
    assert time.monotonic() - since < 5


def test_tables_that_are_no_parameters_count_too() -> None:
    with pytest.raises(WeightsError, match="more than any"), metered(1000), torch.device("meta"):
        torch.nn.Module().register_buffer("mask", torch.empty(1000))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0}, {"hidden_size": -1}, {"hidden_size": "x"}, {"num_attention_heads": 7},
        {"rope_theta": "x"}, {"hidden_act": "nothing"}, {"vocab_size": -5}, {"num_hidden_layers": -1, "head_dim": None},
        {"rope_scaling": {"type": "x"}}, {"rope_parameters": 5}, {"layer_types": 3}, {"model_type": []},
        {"model_type": "no-such"}, {"dtype": "float1"},
    ],
)  # fmt: skip
def test_an_odd_config_builds_or_is_an_error_of_ours(changes: dict[str, Any]) -> None:
    with contextlib.suppress(FarflungError):
        measure(config(**changes), torch.float32)
