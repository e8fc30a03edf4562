"""Linear layers by another route: the same products, for any number of rows, after any change of the weights."""

import pytest
import torch
from torch import nn

from farflung.engine.matmul import FEW_ROWS, FULL_ROWS, LEAST_WEIGHT, hasten

WIDTH, HEIGHT = 192, LEAST_WEIGHT // 192 + 1
ROWS = (1, 2, FEW_ROWS, FEW_ROWS + 1, FULL_ROWS, FULL_ROWS + 1)


@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_a_plain_layer(bias: bool) -> None:
    torch.manual_seed(1)
    plain, fast = nn.Linear(WIDTH, HEIGHT, bias=bias), nn.Linear(WIDTH, HEIGHT, bias=bias)
    fast.load_state_dict(plain.state_dict())
    hasten(nn.Sequential(fast))
    assert type(fast) is not nn.Linear
    for rows in ROWS:
        x = torch.randn(rows, 1, WIDTH)
        with torch.inference_mode():
            torch.testing.assert_close(fast(x), plain(x))


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


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch without MKL packs nothing")
def test_weights_are_packed_for_a_full_batch_that_decodes_and_for_no_prefill() -> None:
    fast = nn.Linear(WIDTH, HEIGHT)
    hasten(nn.Sequential(fast))
    with torch.inference_mode():
        for shape in ((1, FULL_ROWS), (FULL_ROWS,), (FEW_ROWS, 1)):
            fast(torch.randn(*shape, WIDTH))
        assert fast._packed[1] is None
        fast(torch.randn(FULL_ROWS, 1, WIDTH))
    assert fast._packed[1] is not None


def test_small_layers_other_types_and_classes_of_their_own_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    small, own, half = nn.Linear(8, 8), Own(WIDTH, HEIGHT), nn.Linear(WIDTH, HEIGHT).bfloat16()
    hasten(nn.Sequential(small, own, half))
    assert type(small) is nn.Linear
    assert type(own) is Own
    x = torch.randn(16, WIDTH).bfloat16()
    with torch.inference_mode():
        assert torch.equal(half(x), nn.functional.linear(x, half.weight, half.bias))
