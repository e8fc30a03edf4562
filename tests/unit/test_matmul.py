"""Linear layers by another route: the same products, for any number of rows, after any change of the weights."""

import pytest
import torch
from torch import nn

from farflung.engine.matmul import FEW_ROWS, FULL_ROWS, hasten

ROWS = (1, 2, FEW_ROWS, FEW_ROWS + 1, FULL_ROWS, FULL_ROWS + 1)


@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_a_plain_layer(bias: bool) -> None:
    torch.manual_seed(1)
    plain, fast = nn.Linear(24, 40, bias=bias), nn.Linear(24, 40, bias=bias)
    fast.load_state_dict(plain.state_dict())
    hasten(nn.Sequential(fast))
    assert type(fast) is not nn.Linear
    for rows in ROWS:
        x = torch.randn(rows, 1, 24)
        with torch.inference_mode():
            torch.testing.assert_close(fast(x), plain(x))


def test_weights_that_were_loaded_anew_are_the_ones_that_count() -> None:
    fast = nn.Linear(24, 40)
    hasten(nn.Sequential(fast))
    for seed in (1, 2):
        torch.manual_seed(seed)
        plain = nn.Linear(24, 40)
        with torch.no_grad():
            for mine, given in zip(fast.parameters(), plain.parameters(), strict=True):
                mine.copy_(given)
        for rows in ROWS:
            x = torch.randn(rows, 24)
            with torch.inference_mode():
                torch.testing.assert_close(fast(x), plain(x))


def test_other_types_and_layers_of_a_class_of_their_own_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    own, half = Own(8, 8), nn.Linear(8, 8).bfloat16()
    hasten(nn.Sequential(own, half))
    assert type(own) is Own
    x = torch.randn(16, 8).bfloat16()
    with torch.inference_mode():
        assert torch.equal(half(x), nn.functional.linear(x, half.weight, half.bias))
