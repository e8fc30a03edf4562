"""Possession: which slices are asked for, and what an engine that missed an update answers."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from farflung.engine.loading import read_slices
from farflung.protocol import probe, seeds

KEY, NONCE = bytes(range(32)), "ab" * 32
SHAPES = [("embed", (49, 576)), ("norm", (576,)), ("down", (576, 153)), ("scale", ())]


@given(st.binary(min_size=32, max_size=32))
def test_slices_lie_inside_their_tensors(key: bytes) -> None:
    sizes = {"embed": 49 * 576, "norm": 576, "down": 576 * 153, "scale": 1}
    chosen = probe.slices(SHAPES, key)
    assert len(chosen) == probe.SLICES
    assert all(0 <= part.start < part.stop <= min(sizes[part.name], part.start + probe.VALUES) for part in chosen)
    assert chosen == probe.slices(SHAPES, key)


def test_another_key_chooses_others() -> None:
    assert probe.slices(SHAPES, KEY) != probe.slices(SHAPES, seeds.probe_key(KEY))


def test_an_update_of_one_value_in_300_is_noticed() -> None:
    generator = torch.Generator().manual_seed(0)
    before = {"w": torch.randn(1000, 1000, generator=generator).bfloat16()}
    changed = torch.rand(1000, 1000, generator=generator) < 1 / 300
    after = {"w": torch.where(changed, before["w"] * 1.01, before["w"])}
    for n in range(20):
        chosen = probe.slices([("w", (1000, 1000))], seeds.probe_key(bytes([n]) * 32))
        assert read_slices(before, chosen) != read_slices(after, chosen)
        assert read_slices(after, chosen) == read_slices({"w": after["w"].float()}, chosen), "float32 holds bfloat16"


def test_an_answer_fits_one_nonce_only() -> None:
    assert probe.answer(NONCE, b"x") == probe.answer(NONCE, b"x") != probe.answer("ac" * 32, b"x")
