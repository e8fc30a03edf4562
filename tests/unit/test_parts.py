"""Large tensors in parts: every size of model travels in small bodies, and comes back as it was."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from real_models import MODELS, config_json  # noqa: E402

from farflung.engine.loading import build  # noqa: E402
from farflung.protocol.errors import WeightsError  # noqa: E402
from farflung.weights import parts, publish  # noqa: E402
from farflung.weights.parts import joined, split, whole_shapes  # noqa: E402


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 64)


@pytest.mark.parametrize("name", MODELS)
def test_real_models_travel_in_bodies_of_their_size_at_most(name: str) -> None:
    with torch.device("meta"):
        model = build(config_json(name), torch.bfloat16)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    chunks = list(publish._chunks(split(model.named_parameters())))
    assert max(sum(tensor.nbytes for _, tensor in chunk) for chunk in chunks) <= publish.SHARD_BYTES
    assert len(chunks) < 10_000
    pairs = [(name, tuple(tensor.shape)) for chunk in chunks for name, tensor in chunk]
    assert {name: tuple(shape) for name, shape in whole_shapes(pairs)} == shapes


@given(st.lists(st.tuples(st.integers(0, 70), st.integers(1, 9)), max_size=5))
def test_what_was_split_comes_back(sizes: list[tuple[int, int]]) -> None:
    before, parts.PART_BYTES = parts.PART_BYTES, 64
    try:
        given_tensors = [(f"layer.{i}.weight", torch.randn(*size).bfloat16()) for i, size in enumerate(sizes)]
        travelling = list(split(given_tensors))
        found = list(joined(travelling))
    finally:
        parts.PART_BYTES = before
    assert all(tensor.nbytes <= 64 for _, tensor in travelling)
    assert [name for name, _ in found] == [name for name, _ in given_tensors]
    for (_, tensor), (_, whole) in zip(found, given_tensors, strict=True):
        assert torch.equal(tensor, whole)


def test_parts_that_are_missing_or_out_of_order_are_refused(small) -> None:
    several = list(split([("w", torch.zeros(40, 2)), ("v", torch.ones(3))]))
    assert [name for name, _ in several] == ["w[0]", "w[1]", "w[2]", "w[3]", "w[4]", "v"]
    for wrong in ([several[0], *several[2:]], several[1:], [several[0], several[5], *several[1:5]]):
        with pytest.raises(WeightsError, match="tensor w has part"):
            list(joined(wrong))
