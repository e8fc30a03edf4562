"""Advantages and losses, worked by hand, and against each other where they must agree."""

import math
from collections.abc import Iterator

import pytest
import torch

from farflung.learner.filters import is_informative
from farflung.learner.loss import (
    LossParts,
    Objective,
    Sample,
    advantages,
    denominator,
    importance,
    k3,
    mismatch_kl,
    policy_loss,
)


@pytest.fixture(autouse=True)
def made_there(device: str) -> Iterator[None]:
    """Tensors are made on each device in turn."""
    with torch.device(device):
        yield


def loss_of(logp, old, adv, mask, *, total: float | None = None, **settings) -> tuple[torch.Tensor, LossParts]:
    return policy_loss(Sample(logp, old, adv, mask), Objective(**settings), total)


def one_token_loss(ratio: float, advantage: float, **settings) -> tuple[float, float]:
    """Loss and gradient with respect to logp of a single token."""
    logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, _ = loss_of(logp, torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1), **settings)
    loss.backward()
    return float(loss.detach()), float(logp.grad)


def random_batch(seed: int = 3, spread: float = 1.0) -> tuple[torch.Tensor, ...]:
    """logp, old logp, advantages and mask of six rollouts."""
    generator = torch.Generator().manual_seed(seed)
    logp, old = torch.randn(2, 6, 5, generator=generator, device="cpu") * spread
    adv = torch.randn(6, generator=generator, device="cpu")
    mask = torch.rand(6, 5, generator=generator, device="cpu") < 0.5
    place = torch.get_default_device()
    return logp.to(place), old.to(place), adv.to(place), mask.to(place)


def gradient(logp, old, adv, mask, **settings) -> torch.Tensor:
    leaf = logp.clone().requires_grad_()
    loss_of(leaf, old, adv, mask, **settings)[0].backward()
    return leaf.grad


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
    _, parts = loss_of(ratio.log(), torch.zeros(2, 3), torch.tensor([1.0, -1.0]), mask)
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
    loss, _ = loss_of(logp, logp, torch.tensor([1.0, 3.0]), mask, normalise=normalise, constant=10)
    assert float(loss) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["grpo", "cispo", "gspo"])
@pytest.mark.parametrize("normalise", ["token", "sequence", "constant"])
def test_microbatches_add_up_to_the_minibatch(kind: str, normalise: str) -> None:
    logp, old, adv, mask = random_batch()
    whole, _ = loss_of(logp, old, adv, mask, kind=kind, normalise=normalise, constant=5)
    total = denominator(mask, normalise, 5)
    halves = [
        loss_of(
            *(part[rows] for part in (logp, old, adv, mask)), kind=kind, normalise=normalise, constant=5, total=total
        )[0]
        for rows in (slice(0, 2), slice(2, 6))
    ]
    assert float(sum(halves)) == pytest.approx(float(whole), rel=1e-5)


def test_what_is_masked_has_no_weight_even_if_infinite() -> None:
    logp = torch.tensor([[0.0, math.inf, math.nan]], requires_grad=True)
    loss, parts = loss_of(logp, torch.zeros(1, 3), torch.ones(1), torch.tensor([[1, 0, 0]]))
    loss.backward()
    assert float(loss.detach()) == -1.0
    assert parts.tokens == 1
    assert logp.grad.tolist() == [[-1.0, 0.0, 0.0]]


def test_an_empty_microbatch_costs_nothing() -> None:
    loss, parts = loss_of(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1), torch.zeros(1, 2))
    assert (float(loss), parts.tokens) == (0.0, 0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "grad"),
    [
        (1.0, 2.0, -2.0),
        (0.5, 1.0, -0.5),
        (1.5, 1.0, -1.2),  # the weight is held, the gradient stays
        (1.5, -1.0, 1.2),
        (0.1, -1.0, 0.1),  # nothing is held from below
    ],
)
def test_cispo_by_hand(ratio: float, advantage: float, grad: float) -> None:
    loss, found = one_token_loss(ratio, advantage, kind="cispo")
    assert found == pytest.approx(grad, abs=1e-6)
    assert loss == pytest.approx(grad * math.log(ratio), abs=1e-6)


def test_gspo_by_hand() -> None:
    logp = torch.tensor([[math.log(1.2), math.log(1.3), 9.0]], requires_grad=True)
    loss, parts = loss_of(
        logp,
        torch.zeros(1, 3),
        torch.ones(1),
        torch.tensor([[1, 1, 0]]),
        kind="gspo",
        epsilon=0.3,
        normalise="sequence",
    )
    loss.backward()
    ratio = math.sqrt(1.2 * 1.3)
    assert float(loss.detach()) == pytest.approx(-ratio)
    assert logp.grad[0].tolist() == pytest.approx([-ratio / 2, -ratio / 2, 0.0])
    assert (parts.clipped, parts.ratio_max) == (0, pytest.approx(ratio))
    assert one_token_loss(1.5, 1.0, kind="gspo") == pytest.approx((-1.2, 0.0))


@pytest.mark.parametrize("kind", ["cispo", "gspo"])
def test_before_the_first_update_every_kind_has_the_gradient_of_grpo(kind: str) -> None:
    logp, _, adv, mask = random_batch()
    plain = gradient(logp, logp, adv, mask, normalise="sequence")
    assert plain.abs().max() > 0.01
    torch.testing.assert_close(gradient(logp, logp, adv, mask, kind=kind, normalise="sequence"), plain)


def test_gspo_and_grpo_agree_where_a_sequence_is_one_token() -> None:
    logp, old, adv, _ = random_batch(spread=0.2)
    mask = torch.tensor([[0, 1, 0, 0, 0]]).expand(6, 5)
    whole = {kind: gradient(logp, old, adv, mask, kind=kind, delta=1e9) for kind in ("grpo", "gspo")}
    torch.testing.assert_close(whole["gspo"], whole["grpo"])


def test_a_wide_clip_is_no_clip_and_plain_importance_sampling() -> None:
    logp, old, adv, mask = random_batch()
    free = {"epsilon": 0.999999, "epsilon_high": 1e9, "delta": 1e9}
    expected = -(adv[:, None] * (logp - old).exp() * mask) / mask.sum()
    torch.testing.assert_close(gradient(logp, old, adv, mask, kind="cispo", **free), expected)
    torch.testing.assert_close(gradient(logp, old, adv, mask, **free), expected)


def test_a_higher_clip_from_above_leaves_the_lower_one() -> None:
    assert one_token_loss(1.25, 1.0, epsilon_high=0.28) == pytest.approx((-1.25, -1.25))
    assert one_token_loss(0.75, -1.0, epsilon_high=0.28) == pytest.approx((0.8, 0.0))


def test_dr_grpo_weighs_a_token_the_same_however_long_its_rollout() -> None:
    logp, mask = torch.zeros(2, 4), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    found = gradient(logp, logp, torch.tensor([1.0, 1.0]), mask, normalise="constant", constant=4)
    assert found[mask.bool()].tolist() == pytest.approx([-1 / 8] * 5)
    per_rollout = gradient(logp, logp, torch.tensor([1.0, 1.0]), mask, normalise="sequence")
    assert per_rollout.sum(dim=1).tolist() == pytest.approx([-0.5, -0.5])


def test_k3_is_the_kl_on_average_and_pulls_towards_the_reference() -> None:
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
    expected = (policy * (policy / reference).log()).sum()
    assert float((policy * k3(reference.log(), policy.log())).sum()) == pytest.approx(float(expected))
    logp = torch.tensor([[-1.0]], requires_grad=True)
    sample = Sample(logp, logp.detach(), torch.zeros(1), torch.ones(1, 1), reference_logp_BT=torch.tensor([[-2.0]]))
    loss, parts = policy_loss(sample, Objective(kl=0.1))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.1 * (math.exp(-1) - 1 + 1))
    assert float(logp.grad) == pytest.approx(0.1 * (1 - math.exp(-1)))  # descending makes the token rarer
    assert parts.kl_sum == pytest.approx(math.exp(-1))


def test_entropy_is_rewarded_with_its_gradient() -> None:
    entropy = torch.tensor([[1.5, 7.0]], requires_grad=True)
    zeros = torch.zeros(1, 2)
    sample = Sample(zeros, zeros, torch.zeros(1), torch.tensor([[1, 0]]), entropy_BT=entropy)
    loss, _ = policy_loss(sample, Objective(entropy=0.01))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-0.015)
    assert entropy.grad[0].tolist() == pytest.approx([-0.01, 0.0])


def test_importance_weights_are_cut_and_scale_the_gradient() -> None:
    old, behaviour = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[math.nan, math.log(2.0), -5.0]])
    weight = importance(old, behaviour, cap=2.0)
    assert weight[0].tolist() == pytest.approx([1.0, 0.5, 2.0])
    logp = old.clone().requires_grad_()
    policy_loss(Sample(logp, old, torch.ones(1), torch.ones(1, 3), weight), Objective())[0].backward()
    assert logp.grad[0].tolist() == pytest.approx([-1 / 3, -0.5 / 3, -2 / 3])


@pytest.mark.parametrize("kind", ["grpo", "cispo", "gspo"])
def test_a_ratio_beyond_all_bounds_stays_finite(kind: str) -> None:
    for ratio in (200.0, -200.0):
        logp = torch.tensor([[ratio]], requires_grad=True)
        loss, _ = loss_of(logp, torch.zeros(1, 1), torch.tensor([-1.0]), torch.ones(1, 1), kind=kind)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(logp.grad).all()


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
