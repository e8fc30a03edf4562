"""Packing: what is trained on, who shares a prompt, what the model is fed."""

import torch

from farflung.learner.pack import MicroBatch, Rollout, Segment, fill, pack


def rollout(*parts: tuple[str, list[int]], advantage: float = 1.0, **more: object) -> Rollout:
    return Rollout(tuple(Segment(source, tuple(ids)) for source, ids in parts), advantage, 1.0, **more)


def predicted(micro: MicroBatch) -> list[int]:
    """The token at the place that predicts each trained one."""
    return micro.rows.ids_RW.flatten()[micro.rows.predictor_N].tolist()


def test_only_what_the_model_wrote_is_trained() -> None:
    turns = rollout(("prompt", [1, 2]), ("model", [3, 4]), ("env", [5]), ("model", [6]))
    (micro,) = pack([turns], 100)
    assert micro.token_BT.tolist() == [[3, 4, 5, 6]]
    assert micro.mask_BT.tolist() == [[True, True, False, True]]
    assert micro.rows.ids_RW.tolist() == [[1, 2, 3, 4, 5]]
    assert predicted(micro) == [2, 3, 5]


def test_a_prompt_is_fed_once_for_all_its_completions() -> None:
    group = [rollout(("prompt", [1, 2, 3]), ("model", ids)) for ids in ([4, 5, 6], [7, 8], [9])]
    (micro,) = pack(group, 100)
    rows = micro.rows
    assert rows.ids_RW.tolist() == [[1, 2, 3, 4, 5, 7]]
    assert rows.place_RW.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert rows.member_RW.tolist() == [[-1, -1, -1, 0, 0, 1]]
    assert predicted(micro) == [3, 4, 5, 3, 7, 3]
    assert not rows.is_plain
    seen = rows.mask()[0, 0].int().tolist()
    assert seen[5] == [1, 1, 1, 0, 0, 1]  # the second completion sees the prompt and itself
    assert seen[4] == [1, 1, 1, 1, 1, 0]
    assert seen[1] == [1, 1, 0, 0, 0, 0]


def test_a_short_tree_fills_the_rest_of_a_longer_row() -> None:
    def group(prompt: list[int], count: int) -> list[Rollout]:
        return [rollout(("prompt", prompt), ("model", [9, 9])) for _ in range(count)]

    (micro,) = pack([*group([1, 2, 3], 4), *group([4, 5, 6], 2), *group([7], 1)], 14)
    assert micro.rows.tree_RW.tolist() == [[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1]]
    assert micro.index == (0, 1, 2, 3, 4, 5, 6)
    seen = micro.rows.mask()[1, 0].int().tolist()
    assert seen[6] == [0, 0, 0, 0, 0, 1, 1]
    assert fill([micro]) == 1.0


def test_there_are_micro_batches_for_as_many_updates_as_are_wanted() -> None:
    rollouts = [Rollout((Segment("prompt", (n,)), Segment("model", (1, 2, 3))), 1.0, 1.0) for n in range(8)]
    assert [len(pack(rollouts, 1000, at_least=count)) for count in (1, 2, 4, 8)] == [1, 2, 4, 8]
    assert len(pack(rollouts, 1000, at_least=20)) == 8
    assert pack([], 1000, at_least=4) == []


def test_more_updates_cut_a_micro_batch_between_its_rows() -> None:
    rollouts = [rollout(("prompt", [k] * 9), ("model", [7] * 5)) for k in range(6) for _ in range(4)]
    packed = pack(rollouts, 50, at_least=4)
    assert [len(micro.rows.ids_RW) for micro in packed] == [1, 1, 2, 2]
    assert sum(int((micro.rows.tree_RW >= 0).sum()) for micro in packed) == 6 * (9 + 4 * 4), "no prompt is fed twice"


def test_groups_are_cut_no_finer_than_it_takes_and_evenly() -> None:
    rollouts = [rollout(("prompt", [k] * 35), ("model", [7] * 11)) for k in range(2) for _ in range(8)]
    assert [len(micro.index) for micro in pack(rollouts, 400, at_least=4)] == [4, 4, 4, 4]


def test_rows_are_padded_on_the_right_and_longest_first() -> None:
    long = rollout(("prompt", [1]), ("model", [2, 3, 4]), advantage=-1.0)
    short = rollout(("prompt", [5, 6]), ("model", [7]), advantage=0.5)
    (micro,) = pack([short, long], 8)
    assert micro.index == (1, 0)
    assert micro.rows.ids_RW.tolist() == [[1, 2, 3], [5, 6, 0]]
    assert micro.rows.is_plain
    assert micro.mask_BT.tolist() == [[True, True, True], [True, False, False]]
    assert micro.adv_B.tolist() == [-1.0, 0.5]
    assert fill([micro]) == 5 / 6


def test_a_prompt_much_shorter_than_its_completions_is_not_worth_sharing() -> None:
    (micro,) = pack([rollout(("prompt", [1]), ("model", [2] * 9)) for _ in range(2)], 100)
    assert micro.rows.is_plain
    assert micro.rows.ids_RW.shape == (2, 9)


def test_without_sharing_each_row_is_one_rollout() -> None:
    group = [rollout(("prompt", [1, 2, 3]), ("model", [4, 5])) for _ in range(3)]
    (micro,) = pack(group, 100, is_shared=False)
    assert micro.rows.is_plain
    assert micro.rows.ids_RW.tolist() == [[1, 2, 3, 4]] * 3


def test_a_token_nothing_predicts_is_not_trained() -> None:
    (micro,) = pack([rollout(("model", [1, 2]))], 10)
    assert micro.token_BT.tolist() == [[2]]
    assert predicted(micro) == [1]


def test_a_rollout_over_the_bound_goes_alone_and_an_untrained_one_nowhere() -> None:
    rollouts = [
        rollout(("prompt", [1]), ("model", [2] * 20)),
        rollout(),
        rollout(("prompt", [1, 2])),
        rollout(("prompt", [1]), ("model", [2])),
    ]
    assert [micro.index for micro in pack(rollouts, 4)] == [(0,), (3,)]


def test_greedy_rollouts_are_judged_at_temperature_one() -> None:
    greedy = Rollout((Segment("prompt", (1,)), Segment("model", (2,))), 1.0, 0.0)
    assert pack([greedy], 10)[0].temperature_B.tolist() == [1.0]


def test_worker_logp_is_placed_on_model_tokens_and_ignored_if_of_wrong_length() -> None:
    parts = (("prompt", [1]), ("model", [2, 3]))
    right = rollout(*parts, worker_logp=(-0.5, -1.5))
    wrong = rollout(*parts, worker_logp=(-0.5,))
    (micro,) = pack([right, wrong, rollout(*parts)], 100)
    assert micro.worker_logp_BT[0].tolist() == [-0.5, -1.5]
    assert torch.isnan(micro.worker_logp_BT).sum(dim=1).tolist() == [0, 2, 2]
    assert pack([rollout(*parts)], 100)[0].worker_logp_BT is None
