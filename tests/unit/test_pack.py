"""Packing: masks follow the segments, order follows the lengths."""

import torch

from farflung.learner.pack import Rollout, Segment, pack


def rollout(*parts: tuple[str, list[int]], advantage: float = 1.0, **more: object) -> Rollout:
    return Rollout(tuple(Segment(source, tuple(ids)) for source, ids in parts), advantage, 1.0, **more)


def test_only_what_the_model_wrote_is_trained() -> None:
    turns = rollout(("prompt", [1, 2]), ("model", [3, 4]), ("env", [5]), ("model", [6]))
    (micro,) = pack([turns], 100)
    assert micro.ids_BT.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert micro.mask_BT.tolist() == [[False, False, True, True, False, True]]


def test_rows_are_padded_on_the_right_and_shortest_first() -> None:
    long = rollout(("prompt", [1]), ("model", [2, 3, 4]), advantage=-1.0)
    short = rollout(("prompt", [5]), ("model", [6]), advantage=0.5)
    (micro,) = pack([long, short], 8)
    assert micro.index == (1, 0)
    assert micro.ids_BT.tolist() == [[5, 6, 0, 0], [1, 2, 3, 4]]
    assert micro.mask_BT.tolist() == [[False, True, False, False], [False, True, True, True]]
    assert micro.adv_B.tolist() == [0.5, -1.0]


def test_a_token_nothing_predicts_is_not_trained() -> None:
    (micro,) = pack([rollout(("model", [1, 2]))], 10)
    assert micro.mask_BT.tolist() == [[False, True]]


def test_a_rollout_over_the_bound_goes_alone_and_an_empty_one_nowhere() -> None:
    rollouts = [rollout(("prompt", [1]), ("model", [2] * 20)), rollout(), rollout(("prompt", [1]), ("model", [2]))]
    assert [micro.index for micro in pack(rollouts, 4)] == [(2,), (0,)]


def test_greedy_rollouts_are_judged_at_temperature_one() -> None:
    greedy = Rollout((Segment("prompt", (1,)), Segment("model", (2,))), 1.0, 0.0)
    assert pack([greedy], 10)[0].temperature_B.tolist() == [1.0]


def test_worker_logp_is_placed_on_model_tokens_and_ignored_if_of_wrong_length() -> None:
    parts = (("prompt", [1]), ("model", [2, 3]))
    right = rollout(*parts, worker_logp=(-0.5, -1.5))
    wrong = rollout(*parts, worker_logp=(-0.5,))
    (micro,) = pack([right, wrong, rollout(*parts)], 100)
    assert micro.worker_logp_BT[0, 1:].tolist() == [-0.5, -1.5]
    assert torch.isnan(micro.worker_logp_BT).sum(dim=1).tolist() == [1, 3, 3]
    assert pack([rollout(*parts)], 100)[0].worker_logp_BT is None
