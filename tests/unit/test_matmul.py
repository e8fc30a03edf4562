"""Linear layers by another route: the same products, for any number of rows, after any change of the weights."""

import pytest
import torch
from torch import nn

from farflung.engine.matmul import LEAST_WEIGHT, hasten

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
    hasten(nn.Sequential(fast))
    assert type(fast) is not nn.Linear
    for shape in [(rows, 1) for rows in ROWS] + [(1, rows) for rows in ROWS]:
        x = torch.randn(*shape, WIDTH, dtype=dtype)
        with torch.inference_mode():
            torch.testing.assert_close(fast(x), plain(x), **TYPES[dtype])


def test_weights_that_were_loaded_anew_are_the_ones_that_count() -> None:
    fast = nn.Linear(WIDTH, HEIGHT)
    hasten(nn.Sequential(fast))
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


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN packs nothing")
def test_weights_are_packed_for_a_batch_that_decodes_and_for_no_prefill() -> None:
    fast = nn.Linear(WIDTH, HEIGHT)
    hasten(nn.Sequential(fast))
    with torch.inference_mode():
        for shape in ((1, 64), (64,), (2, 40)):
            fast(torch.randn(*shape, WIDTH))
        assert fast._packed[1] is None
        fast(torch.randn(64, 1, WIDTH))
    assert fast._packed[1] is not None


def test_where_gradients_are_asked_for_a_layer_has_them() -> None:
    fast = nn.Linear(WIDTH, HEIGHT)
    hasten(nn.Sequential(fast))
    fast(torch.randn(2, 1, WIDTH)).sum().backward()
    assert fast.weight.grad is not None


def test_small_layers_other_types_and_classes_of_their_own_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    small, own, double = nn.Linear(8, 8), Own(WIDTH, HEIGHT), nn.Linear(WIDTH, HEIGHT).double()
    hasten(nn.Sequential(small, own, double))
    assert type(small) is nn.Linear
    assert type(own) is Own
    x = torch.randn(16, WIDTH).double()
    with torch.inference_mode():
        assert torch.equal(double(x), nn.functional.linear(x, double.weight, double.bias))
