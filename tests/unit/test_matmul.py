"""Linear layers by another route: the same products, for any number of rows, after any change of the weights."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from farflung.engine.cpu import matmul
from farflung.engine.cpu.matmul import LEAST_WEIGHT, can_multiply, optimise_linears

WIDTH, HEIGHT = 192, LEAST_WEIGHT // 192 + 1
ROWS = (1, 2, 40, 41, 64, 65)
TYPES = {torch.float32: {}, torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2}}
"""How near products of each type are to those of a plain layer."""


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
def test_products_are_those_of_a_plain_layer(bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    plain, fast = (nn.Linear(WIDTH, HEIGHT, bias=bias, dtype=dtype) for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    optimise_linears(nn.Sequential(fast))
    assert (type(fast) is not nn.Linear) == can_multiply(dtype)
    for shape in [(rows, 1) for rows in ROWS] + [(1, rows) for rows in ROWS]:
        x = torch.randn(*shape, WIDTH, dtype=dtype)
        with torch.inference_mode():
            torch.testing.assert_close(fast(x), plain(x), **TYPES[dtype])


def test_weights_that_were_loaded_anew_are_the_ones_that_count() -> None:
    fast = nn.Linear(WIDTH, HEIGHT)
    optimise_linears(nn.Sequential(fast))
    for seed in (1, 2):
        torch.manual_seed(seed)
        plain = nn.Linear(WIDTH, HEIGHT)
        with torch.no_grad():
            for mine, given in zip(fast.parameters(), plain.parameters(), strict=True):
                mine.copy_(given)
        for rows in ROWS:
            x = torch.randn(rows, 1, WIDTH)
            with torch.inference_mode():
                torch.testing.assert_close(fast(x), plain(x))


@pytest.fixture
def anew() -> Iterator[None]:
    """What this CPU can do is found out again, before and after."""
    can_multiply.cache_clear()
    yield
    can_multiply.cache_clear()


def _refuse(*_: object) -> torch.Tensor:
    raise RuntimeError("could not create a primitive descriptor for the inner product forward propagation primitive")


@pytest.mark.parametrize("lacking", ["_product", "_packed"])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_cpu_that_lacks_an_operator_takes_the_usual_product(
    lacking: str, dtype: torch.dtype, anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, lacking, _refuse)
    plain, fast = (nn.Linear(WIDTH, HEIGHT, dtype=dtype) for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    optimise_linears(nn.Sequential(fast))
    assert not can_multiply(dtype, is_packed=True)
    x = torch.randn(4, 1, WIDTH, dtype=dtype)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), plain(x), **TYPES[dtype])


def test_a_product_that_comes_out_wrong_is_not_taken(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_product", lambda rows, *_: rows + 1)
    assert not can_multiply(torch.float32)


def test_layers_of_a_type_that_is_not_the_cpus_stay_plain() -> None:
    layer = nn.Linear(WIDTH, HEIGHT).to(torch.float16)
    optimise_linears(nn.Sequential(layer))
    assert type(layer) is nn.Linear


@pytest.mark.skipif(not can_multiply(torch.float32, is_packed=True), reason="this CPU or torch packs nothing")
def test_weights_are_packed_for_a_batch_that_decodes_and_for_no_prefill() -> None:
    fast = nn.Linear(WIDTH, HEIGHT)
    optimise_linears(nn.Sequential(fast))
    with torch.inference_mode():
        for shape in ((1, 64), (64,), (2, 40)):
            fast(torch.randn(*shape, WIDTH))
        assert fast._packed[1] is None
        fast(torch.randn(64, 1, WIDTH))
    assert fast._packed[1] is not None


def test_where_gradients_are_asked_for_a_layer_has_them() -> None:
    fast = nn.Linear(WIDTH, HEIGHT)
    optimise_linears(nn.Sequential(fast))
    fast(torch.randn(2, 1, WIDTH)).sum().backward()
    assert fast.weight.grad is not None


def test_small_layers_other_types_and_classes_of_their_own_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    small, own, double = nn.Linear(8, 8), Own(WIDTH, HEIGHT), nn.Linear(WIDTH, HEIGHT).double()
    optimise_linears(nn.Sequential(small, own, double))
    assert type(small) is nn.Linear
    assert type(own) is Own
    x = torch.randn(16, WIDTH).double()
    with torch.inference_mode():
        assert torch.equal(double(x), nn.functional.linear(x, double.weight, double.bias))
