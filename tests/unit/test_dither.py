"""Dithered rounding: exact on the grid, right on average off it, and always to a neighbour."""

from itertools import pairwise

import torch

from farflung.numerics.rounding import dithered


def test_what_is_bfloat16_already_stays() -> None:
    grid = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(dithered(grid.float().view(400, 500)), grid.view(400, 500))


def test_small_updates_show_on_average_and_at_once() -> None:
    start = torch.randn(300_000, generator=torch.Generator().manual_seed(1)).mul_(0.05).bfloat16().float()
    moved = start + 1e-5
    seen = dithered(moved).float() - start
    assert abs(float(seen.mean()) - 1e-5) < 1e-6
    nearest = moved.bfloat16().float() - start
    assert (seen != 0).sum() > 2 * (nearest != 0).sum()


def test_each_value_goes_to_one_of_its_neighbours() -> None:
    value = torch.randn(100_000, generator=torch.Generator().manual_seed(2))
    low, found = (value.view(torch.int32) & -65536).view(torch.float32), dithered(value).float()
    high = ((value.view(torch.int32) & -65536) + 65536).view(torch.float32)
    assert ((found == low) | (found == high)).all()
    assert float((found - value).mean().abs()) < 1e-4


def test_a_weight_that_has_crossed_its_threshold_does_not_flicker() -> None:
    start = torch.randn(70_000, generator=torch.Generator().manual_seed(3)).bfloat16().float().abs()
    steps = [dithered(start + k * 1e-4).float() for k in range(6)]
    assert all((later >= earlier).all() for earlier, later in pairwise(steps))
