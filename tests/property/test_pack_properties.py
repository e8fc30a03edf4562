"""Packing loses nothing, adds nothing, keeps its bound and always gives the same."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farflung.learner.pack import MicroBatch, Rollout, Segment, pack

segments = st.builds(
    Segment, st.sampled_from(["prompt", "model", "env"]), st.lists(st.integers(1, 3), max_size=8).map(tuple)
)
rollouts = st.lists(
    st.builds(Rollout, st.lists(segments, max_size=4).map(tuple), st.floats(-2, 2, width=32), st.just(1.0)),
    max_size=12,
)


def flat(rollout: Rollout) -> list[tuple[int, bool]]:
    return [(token, segment.source == "model") for segment in rollout.segments for token in segment.ids]


def is_trained(rollout: Rollout) -> bool:
    return any(is_model for _, is_model in flat(rollout)[1:])


def seen_by(micro: MicroBatch, place: int) -> list[int]:
    """The ids that one fed place attends to, itself the last."""
    width = micro.rows.ids_RW.shape[1]
    r, column = divmod(place, width)
    visible = range(column + 1) if micro.rows.is_plain else micro.rows.mask()[r, 0, column].nonzero()[:, 0].tolist()
    return [int(micro.rows.ids_RW[r, k]) for k in visible]


@settings(max_examples=100)
@given(rollouts, st.integers(1, 80), st.booleans())
def test_every_rollout_is_packed_once_within_the_bound(batch: list[Rollout], bound: int, is_shared: bool) -> None:
    packed = pack(batch, bound, is_shared=is_shared)
    assert sorted(i for micro in packed for i in micro.index) == [i for i, r in enumerate(batch) if is_trained(r)]
    assert all(micro.rows.ids_RW.numel() <= bound or len(micro.index) == 1 for micro in packed)


@settings(max_examples=100)
@given(rollouts, st.integers(1, 80), st.booleans())
def test_each_trained_token_is_predicted_from_all_that_precedes_it(
    batch: list[Rollout], bound: int, is_shared: bool
) -> None:
    for micro in pack(batch, bound, is_shared=is_shared):
        places = iter(micro.rows.predictor_N.tolist())
        for b, index in enumerate(micro.index):
            tokens = flat(batch[index])
            trained = [at for at, (_, is_model) in enumerate(tokens) if is_model and at]
            assert micro.token_BT[b][micro.mask_BT[b]].tolist() == [tokens[at][0] for at in trained]
            assert float(micro.adv_B[b]) == batch[index].advantage
            for at in trained:
                assert seen_by(micro, next(places)) == [token for token, _ in tokens[:at]]
        assert next(places, None) is None


@settings(max_examples=50)
@given(rollouts, st.integers(1, 80))
def test_the_same_rollouts_pack_the_same(batch: list[Rollout], bound: int) -> None:
    for one, other in zip(pack(batch, bound), pack(list(batch), bound), strict=True):
        assert one.index == other.index
        assert torch.equal(one.rows.ids_RW, other.rows.ids_RW)
