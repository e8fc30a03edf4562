"""Advantages and the clipped loss, worked by hand."""

import math

import pytest
import torch

from farflung.learner.filters import is_informative
from farflung.learner.loss import advantages, clipped_loss, denominator, mismatch_kl


def one_token_loss(ratio: float, advantage: float) -> tuple[float, float]:
    """Loss and gradient with respect to logp of a single token."""
    logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, _ = clipped_loss(logp, torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1))
    loss.backward()
    return float(loss.detach()), float(logp.grad)


def test_advantages_by_hand() -> None:
    adv = advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]), eps=0.0)
    assert torch.allclose(adv[0], torch.tensor([3.0, -1.0, -1.0, -1.0]) / math.sqrt(3))
    assert torch.allclose(adv[1], torch.tensor([1.0, 1.0, -1.0, -1.0]))


def test_advantages_without_division() -> None:
    adv = advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), divide_by_std=False)
    assert adv.tolist() == [[0.75, -0.25, -0.25, -0.25]]


@pytest.mark.parametrize("rewards", [[[1.0, 1.0]], [[0.0, 0.0]], [[0.5]]])
def test_groups_without_variance_have_no_advantage(rewards: list[list[float]]) -> None:
    assert torch.count_nonzero(advantages(torch.tensor(rewards))) == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "grad"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 1.0, -1.1, -1.1),
        (1.5, 1.0, -1.2, 0.0),  # gain clipped at 1 + epsilon
        (0.5, 1.0, -0.5, -0.5),  # a good token that became rarer keeps its whole gradient
        (0.5, -1.0, 0.8, 0.0),  # a bad token is pushed no further than 1 - epsilon
        (3.0, -1.0, 3.0, 3.0),
        (9.0, -1.0, 4.0, 0.0),  # and no harder than delta
    ],
)
def test_two_sided_clip_by_hand(ratio: float, advantage: float, loss: float, grad: float) -> None:
    assert one_token_loss(ratio, advantage) == pytest.approx((loss, grad), abs=1e-6)


def test_clip_fraction_and_ratios() -> None:
    ratio = torch.tensor([[1.5, 1.0, 0.5], [9.0, 0.5, 7.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    _, parts = clipped_loss(ratio.log(), torch.zeros(2, 3), torch.tensor([1.0, -1.0]), mask)
    assert (parts.tokens, parts.clipped) == (5, 3)
    assert parts.ratio_max == pytest.approx(9.0)
    assert parts.ratio_sum == pytest.approx(1.5 + 1 + 0.5 + 9 + 0.5)


@pytest.mark.parametrize(
    ("normalise", "expected"),
    [("token", -(2 * 1 + 1 * 3) / 3), ("sequence", -(1 + 3) / 2), ("constant", -(2 * 1 + 1 * 3) / 20)],
)
def test_normalisation_by_hand(normalise: str, expected: float) -> None:
    mask = torch.tensor([[0, 1, 1], [0, 1, 0]])
    logp = torch.zeros(2, 3)
    loss, _ = clipped_loss(logp, logp, torch.tensor([1.0, 3.0]), mask, normalise=normalise, constant=10)
    assert float(loss) == pytest.approx(expected)


@pytest.mark.parametrize("normalise", ["token", "sequence", "constant"])
def test_microbatches_add_up_to_the_minibatch(normalise: str) -> None:
    generator = torch.Generator().manual_seed(3)
    logp, old = torch.randn(2, 6, 5, generator=generator)
    adv, mask = torch.randn(6, generator=generator), torch.rand(6, 5, generator=generator) < 0.5
    whole, _ = clipped_loss(logp, old, adv, mask, normalise=normalise, constant=5)
    total = denominator(mask, normalise, 5)
    halves = [
        clipped_loss(logp[rows], old[rows], adv[rows], mask[rows], normalise=normalise, constant=5, total=total)[0]
        for rows in (slice(0, 2), slice(2, 6))
    ]
    assert float(sum(halves)) == pytest.approx(float(whole), rel=1e-5)


def test_what_is_masked_has_no_weight_even_if_infinite() -> None:
    logp = torch.tensor([[0.0, math.inf, math.nan]], requires_grad=True)
    loss, parts = clipped_loss(logp, torch.zeros(1, 3), torch.ones(1), torch.tensor([[1, 0, 0]]))
    loss.backward()
    assert float(loss.detach()) == -1.0
    assert parts.tokens == 1
    assert logp.grad.tolist() == [[-1.0, 0.0, 0.0]]


def test_an_empty_microbatch_costs_nothing() -> None:
    loss, parts = clipped_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1), torch.zeros(1, 2))
    assert (float(loss), parts.tokens) == (0.0, 0)


def test_mismatch_kl_is_finite_whatever_a_worker_claims() -> None:
    logp = torch.zeros(1, 4)
    claimed = torch.tensor([[math.nan, math.inf, -math.inf, 0.0]])
    assert math.isfinite(mismatch_kl(claimed, logp, torch.ones(1, 4)))
    half = mismatch_kl(torch.full((1, 1), 0.5), torch.zeros(1, 1), torch.ones(1, 1))
    assert half == pytest.approx(math.exp(-0.5) - 1 + 0.5)


def test_filters() -> None:
    assert is_informative([0.0, 1.0])
    assert not is_informative([1.0, 1.0])
    assert not is_informative([1.0])
    assert not is_informative([])
