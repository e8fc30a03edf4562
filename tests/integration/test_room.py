"""Room for real models on real devices: parameters as their makers count them, and what fits where."""

import json
import re

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from real_models import config_json, shape  # noqa: E402
from safetensors import safe_open  # noqa: E402

from farflung.engine.fit import (  # noqa: E402
    Place,
    Size,
    Text,
    fit,
    host_bytes,
    longest,
    measure,
    most_rows,
    needed_bytes,
    refuse_host,
    shortened,
    with_whole_head,
)
from farflung.engine.loading import build  # noqa: E402
from farflung.engine.vllm import save_one_by_one  # noqa: E402
from farflung.protocol.errors import WeightsError  # noqa: E402
from standin import INFO  # noqa: E402

BF16, FP32 = torch.bfloat16, torch.float32


COUNTED = {
    "SmolLM2-135M": (134_515_008, 30 * 2 * 192),
    "Qwen2.5-1.5B": (1_543_714_304, 28 * 2 * 256),
    "Qwen2.5-3B": (3_085_938_688, 36 * 2 * 256),
    "Qwen2.5-7B": (7_615_616_512, 28 * 2 * 512),
    "Qwen3-8B": (8_190_735_360, 36 * 2 * 1024),
    "Mistral-7B-v0.1": (7_241_732_096, 32 * 2 * 1024),
    "Gemma-2-9B": (9_241_705_984, 42 * 2 * 2048),
    "Qwen2.5-32B": (32_763_876_352, 64 * 2 * 1024),
    "Llama-3.3-70B": (70_553_706_496, 80 * 2 * 1024),
}
"""Parameters as the model's page has them, and values that its cache keeps of a token."""
sizes: dict[tuple[str, torch.dtype], Size] = {}


def size_of(name: str, dtype: torch.dtype) -> Size:
    if (name, dtype) not in sizes:
        sizes[name, dtype] = measure(config_json(name), dtype)
    return sizes[name, dtype]


@pytest.mark.parametrize("name", COUNTED)
def test_a_model_is_counted_as_its_makers_count_it(name: str) -> None:
    size, (parameters, kept) = size_of(name, BF16), COUNTED[name]
    assert (size.parameters, size.cached_values(1)) == (parameters, kept)
    assert 0 <= size.weights_bytes - 2 * parameters < 1e5, "and tables of rotations"


def test_windows_bound_what_is_kept() -> None:
    gemma, mistral, plain = (size_of(name, BF16) for name in ("Gemma-2-9B", "Mistral-7B-v0.1", "Qwen2.5-7B"))
    assert mistral.cached_values(9000) == mistral.cached_values(4096)
    assert gemma.cached_values(9000) == 21 * 2 * 2048 * (9000 + 4096), "every second layer has a window"
    assert plain.cached_values(9000) == 9000 * plain.cached_values(1)


GIB = 2**30
CARDS = {
    "RTX 3060 12 GB": Place("NVIDIA GeForce RTX 3060 (cuda:0)", "cuda:0", int(0.9 * 11.6 * GIB)),
    "RTX 3090 24 GB": Place("NVIDIA GeForce RTX 3090 (cuda:0)", "cuda:0", int(0.9 * 23.4 * GIB)),
    "H100 80 GB": Place("NVIDIA H100 (cuda:0)", "cuda:0", int(0.9 * 79.0 * GIB)),
    "Mac 16 GB": Place("Apple GPU (mps)", "mps", int(0.9 * 11.8e9)),
    "PC 8 GB": Place("this machine's memory", "cpu", 4 * GIB),
    "PC 64 GB": Place("this machine's memory", "cpu", 32 * GIB),
}
"""Devices, and what a node may take of them: 0.9 of what a display and the driver leave, half of a machine's memory."""
SHORT, LONG, LONGER = Text(512, 1024), Text(1024, 7168), Text(1024, 15_360)


@pytest.mark.parametrize(
    ("model", "dtype", "card", "text", "least", "most"),
    [
        ("Qwen2.5-7B", BF16, "RTX 3090 24 GB", SHORT, 24, 64),
        ("Qwen2.5-7B", BF16, "RTX 3090 24 GB", LONG, 6, 16),
        ("Qwen2.5-7B", BF16, "RTX 3090 24 GB", LONGER, 0, 0),
        ("Qwen2.5-7B", FP32, "RTX 3090 24 GB", SHORT, 0, 0),
        ("Qwen2.5-7B", BF16, "RTX 3060 12 GB", SHORT, 0, 0),
        ("Qwen2.5-3B", BF16, "RTX 3060 12 GB", SHORT, 24, 64),
        ("Qwen2.5-1.5B", FP32, "RTX 3060 12 GB", SHORT, 16, 64),
        ("Qwen2.5-32B", BF16, "H100 80 GB", SHORT, 16, 40),
        ("Qwen2.5-32B", BF16, "H100 80 GB", LONG, 2, 5),
        ("Qwen2.5-32B", FP32, "H100 80 GB", SHORT, 0, 0),
        ("Qwen2.5-7B", BF16, "H100 80 GB", SHORT, 256, 256),
        ("Qwen2.5-7B", BF16, "Mac 16 GB", SHORT, 0, 0),
        ("Qwen2.5-3B", BF16, "Mac 16 GB", SHORT, 24, 64),
        ("SmolLM2-135M", FP32, "PC 8 GB", SHORT, 16, 64),
        ("Qwen2.5-1.5B", FP32, "PC 8 GB", SHORT, 0, 0),
        ("Qwen2.5-7B", BF16, "PC 64 GB", SHORT, 32, 64),
    ],
)
def test_rollouts_at_once_or_none(model, dtype, card, text, least, most) -> None:
    size, place = size_of(model, dtype), CARDS[card]
    if not most:
        with pytest.raises(WeightsError, match=r"what would fit: .*a device with [\d.]+ GB to give"):
            fit(size, place, text)
        return
    slots = fit(size, place, text)
    assert least <= slots <= most
    assert needed_bytes(size, place.kind, text, slots) <= place.bytes
    assert fit(size, place, text, slots) == slots


def test_a_setting_beyond_the_room_is_refused_with_one_that_fits() -> None:
    size, place = size_of("Qwen2.5-7B", BF16), CARDS["RTX 3090 24 GB"]
    with pytest.raises(WeightsError, match=r"3090.*--slots \d+, or 0") as refused:
        fit(size, place, SHORT, 256)
    said = re.search(r"--slots (\d+)", str(refused.value))
    assert said is not None
    slots = int(said[1])
    assert fit(size, place, SHORT, slots) == slots
    with pytest.raises(WeightsError):
        fit(size, place, SHORT, slots + 1)


def test_a_refusal_names_ways_that_work() -> None:
    size, card = size_of("Qwen2.5-7B", BF16), CARDS["RTX 3060 12 GB"]
    with pytest.raises(WeightsError, match=r"takes 15\.2 GB in bfloat16.*--device cpu, \d+ at once"):
        fit(size, card, SHORT, others=[CARDS["PC 64 GB"]])
    card = CARDS["H100 80 GB"]
    with pytest.raises(WeightsError, match=r"--context \d+") as refused:
        fit(size_of("Qwen2.5-32B", BF16), card, Text(1024, 64_000))
    said = re.search(r"--context (\d+)", str(refused.value))
    assert said is not None
    assert fit(size_of("Qwen2.5-32B", BF16), card, shortened(Text(1024, 64_000), int(said[1]))) > 0
    with pytest.raises(WeightsError, match="a profile in bfloat16"):
        fit(size_of("Qwen2.5-7B", FP32), CARDS["RTX 3090 24 GB"], SHORT)


@pytest.mark.parametrize("name", ["Qwen2.5-7B", "Qwen2.5-32B"])
def test_a_machine_beside_an_accelerator_needs_memory_for_tensors_not_for_the_model(name: str) -> None:
    size = size_of(name, BF16)
    assert host_bytes(size) < 4e9 < size.weights_bytes / 3
    refuse_host(size, int(20e9))
    with pytest.raises(WeightsError, match="close other programs"):
        refuse_host(size, int(1e9))


def test_an_output_head_in_float32_is_counted() -> None:
    half, whole = (size_of("Qwen2.5-3B", dtype) for dtype in (BF16, FP32))
    assert with_whole_head(half).weights_bytes - half.weights_bytes == 151_936 * 2048 * 2
    assert with_whole_head(whole) == whole


def test_texts_are_as_long_as_the_run_says_and_the_node_allows() -> None:
    import msgspec

    told = msgspec.structs.replace(INFO, longest_prompt=300, max_new_tokens=700)
    assert longest(told) == Text(300, 700)
    assert longest(told, 400) == Text(200, 200)
    assert longest(told, 5000) == Text(300, 700)
    assert longest(INFO).tokens > 0, "a run that does not say"


def test_a_model_on_another_device_never_lies_in_memory_here() -> None:
    config = json.dumps(shape("qwen2", 2, 64, 128, 64, 4, 2)).encode()
    here = build(config, BF16)
    there = build(config, BF16, "meta")
    assert {name: one.shape for name, one in there.state_dict().items()} == {
        name: one.shape for name, one in here.state_dict().items()
    }
    assert all(one.device.type == "meta" for one in there.parameters())


def test_a_file_of_tensors_that_came_one_by_one_is_read_like_any(tmp_path) -> None:
    tensors = {"a": torch.randn(3, 5).bfloat16(), "b.weight": torch.randn(7), "none": torch.zeros(0, 2)}
    file = tmp_path / "model.safetensors"
    save_one_by_one(file, iter(tensors.items()))
    with safe_open(file, "pt") as found:
        assert set(found.keys()) == set(tensors)
        assert all(torch.equal(found.get_tensor(name), tensor) for name, tensor in tensors.items())
    with pytest.raises(WeightsError, match="twice"):
        save_one_by_one(file, [("a", tensors["a"]), ("a", tensors["a"])])


def test_rows_grow_with_the_room() -> None:
    size = size_of("Qwen2.5-3B", BF16)
    rows = [most_rows(size, Place("", "cuda:0", gib * GIB), SHORT) for gib in (6, 9, 12, 24, 48)]
    assert rows == sorted(rows)
    assert rows[0] == 0 < rows[1]
