"""The base model is loaded with every one of its own tensors, or not at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from farflung.engine.loading import build
from farflung.learner.policy import Policy
from farflung.learner.pretrained import check_pretrained, load_pretrained
from farflung.protocol.errors import ConfigError

BASE = Path(__file__).parents[2] / "examples" / "base"
TENSORS = load_file(BASE / "model.safetensors")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SPARE = "model.layers.9.mlp.up_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"

Make = Callable[[dict[str, torch.Tensor] | None, dict[str, Any]], Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A folder with these tensors and these changes of config.json."""

    def make(tensors: dict[str, torch.Tensor] | None, changes: dict[str, Any]) -> Path:
        fields = json.loads((BASE / "config.json").read_text()) | changes
        (tmp_path / "config.json").write_text(json.dumps(fields))
        shutil.copy(BASE / "generation_config.json", tmp_path)
        save_file(TENSORS if tensors is None else tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return make


def renamed(change: Callable[[str], str]) -> dict[str, torch.Tensor]:
    return {change(name): tensor for name, tensor in TENSORS.items()}


UNTIED = {"tie_word_embeddings": False}
GOOD = {
    "as it is": (None, {}),
    "torch.compile": (renamed("_orig_mod.{}".format), {}),
    "DDP": (renamed("module.{}".format), {}),
    "both": (renamed("module._orig_mod.{}".format), {}),
    "the other way": (renamed("_orig_mod.module.{}".format), {}),
    "compiled layers": (renamed(lambda name: name.replace(".mlp.", "._orig_mod.mlp.")), {}),
    "FSDP": (renamed(lambda name: name.replace("model.", "model._fsdp_wrapped_module.")), {}),
    "without the head's model": (renamed(lambda name: name.removeprefix("model.")), {}),
    "base model": (renamed("base_model.{}".format), {}),
    "adapters merged": (renamed("base_model.model.{}".format), {}),
    "tied twice": (TENSORS | {HEAD: TENSORS[EMBEDDING].clone()}, {}),
    "tied by the head": ({HEAD: TENSORS[EMBEDDING]} | {k: v for k, v in TENSORS.items() if k != EMBEDDING}, {}),
    "untied": (TENSORS | {HEAD: TENSORS[EMBEDDING].clone()}, UNTIED),
    "float32": ({name: tensor.float() for name, tensor in TENSORS.items()}, {"dtype": "float32"}),
    "float16": ({name: tensor.half() for name, tensor in TENSORS.items()}, {"dtype": "float16"}),
    "float64": ({name: tensor.double() for name, tensor in TENSORS.items()}, {}),
    "type of the config alone": (None, {"dtype": "float8_e4m3fn"}),
    "known code": (None, {"auto_map": {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "configuration_x.X"}}),
    "tensor too many": (TENSORS | {SPARE: torch.zeros(4, 4)}, {}),
}
BAD = {
    "head missing": (None, UNTIED, f"lack 1 of its tensors, the first is {HEAD}; .*tie_word_embeddings"),
    "layer missing": ({k: v for k, v in TENSORS.items() if "layers.3." not in k}, {}, "lack 11 of its tensors"),
    "tensor missing": ({k: v for k, v in TENSORS.items() if k != UP}, {}, UP),
    "norm missing": ({k: v for k, v in TENSORS.items() if k != "model.norm.weight"}, {}, "model.norm.weight"),
    "embedding missing": ({k: v for k, v in TENSORS.items() if k != EMBEDDING}, {}, "lack"),
    "other names": (renamed("transformer.{}".format), {}, "lack 45|lack 46|lack 47"),
    "rows": (None, {"vocab_size": 40}, rf"{EMBEDDING} .* has shape \[32, 128\], by config.json \[40, 128\]"),
    "width": (None, {"intermediate_size": 256}, r"has shape .*, by config.json"),
    "more layers": (None, {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}, "layers.4."),
    "tied and different": (TENSORS | {HEAD: TENSORS[EMBEDDING] * 2}, {}, "differ, though config.json ties them"),
    "quantised": (None, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq"),
    "padding": (None, {"pad_token_id": 32}, "cannot be loaded .Padding_idx"),
    "unknown code": (None, {"model_type": "xyz", "auto_map": {"AutoConfig": "x.X"}}, "xyz"),
    "no model type": (None, {"model_type": None}, "cannot be loaded"),
    "odd field": (None, {"num_attention_heads": 0}, "cannot be loaded"),
}


@pytest.mark.parametrize(("tensors", "changes"), GOOD.values(), ids=GOOD)
def test_what_can_be_made_to_work_does(make: Make, caplog, tensors: Any, changes: dict[str, Any]) -> None:
    folder = make(tensors, changes)
    check_pretrained(folder)
    model = load_pretrained(folder, torch.float32)
    found = model.state_dict()
    stored = TENSORS | (tensors or {})
    assert all(torch.equal(found[name], stored[name].float()) for name in TENSORS)
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert is_tied == model.config.tie_word_embeddings
    assert ("unused tensors=1 first=model.layers.9" in caplog.text) == (SPARE in stored)


@pytest.mark.parametrize(("tensors", "changes", "words"), BAD.values(), ids=BAD)
def test_what_would_be_drawn_at_random_is_refused(make: Make, tensors: Any, changes: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        check_pretrained(make(tensors, changes))
    assert "\n" not in str(caught.value)


def test_the_policy_is_as_strict(make: Make) -> None:
    with pytest.raises(ConfigError, match="lack 1 of its tensors"):
        Policy.from_pretrained(make(None, UNTIED))


def test_values_that_are_no_numbers_are_refused(make: Make) -> None:
    broken = TENSORS[UP].clone()
    broken[0, 0] = float("nan")
    folder = make(TENSORS | {UP: broken}, {})
    with pytest.raises(ConfigError, match=f"tensor {UP} of .*NaN"):
        load_pretrained(folder, torch.float32)


@pytest.mark.parametrize(
    "settings",
    [
        transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32),
        transformers.MixtralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
        ),
    ],
    ids=lambda settings: settings.model_type,
)
def test_families_that_store_their_tensors_otherwise(tmp_path: Path, settings: Any) -> None:
    """GPT-2 on the hub has no prefix, a mixture stores its experts one by one."""
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    made.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    save_file({name.removeprefix("transformer."): tensor for name, tensor in stored.items()}, path)
    check_pretrained(tmp_path)
    found = load_pretrained(tmp_path, torch.float32).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in made.state_dict().items())
    assert build(tmp_path, torch.float32).state_dict().keys() == found.keys()
    first = sorted(stored)[-1]
    save_file({name: tensor for name, tensor in stored.items() if name != first}, path)
    with pytest.raises(ConfigError, match=r"lack|cannot be loaded"):
        load_pretrained(tmp_path, torch.float32)
