"""Packing loses nothing, adds nothing, keeps its bound and always gives the same."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farflung.learner.pack import Rollout, Segment, pack

segments = st.builds(
    Segment, st.sampled_from(["prompt", "model", "env"]), st.lists(st.integers(1, 99), max_size=8).map(tuple)
)
rollouts = st.lists(
    st.builds(Rollout, st.lists(segments, max_size=4).map(tuple), st.floats(-2, 2, width=32), st.just(1.0)),
    max_size=12,
)


@settings(max_examples=100, deadline=None)
@given(rollouts, st.integers(1, 80))
def test_every_rollout_is_packed_once_within_the_bound(batch: list[Rollout], bound: int) -> None:
    packed = pack(batch, bound)
    assert sorted(i for micro in packed for i in micro.index) == [i for i, r in enumerate(batch) if len(r)]
    assert all(micro.ids_BT.numel() <= bound or len(micro.index) == 1 for micro in packed)


@settings(max_examples=100, deadline=None)
@given(rollouts, st.integers(1, 80))
def test_tokens_masks_and_advantages_survive(batch: list[Rollout], bound: int) -> None:
    for micro in pack(batch, bound):
        for row, index in enumerate(micro.index):
            flat = [(token, s.source == "model") for s in batch[index].segments for token in s.ids]
            assert micro.ids_BT[row, : len(flat)].tolist() == [token for token, _ in flat]
            assert micro.mask_BT[row, 1 : len(flat)].tolist() == [is_model for _, is_model in flat[1:]]
            assert not micro.mask_BT[row, len(flat) :].any()
            assert float(micro.adv_B[row]) == batch[index].advantage


@settings(max_examples=50, deadline=None)
@given(rollouts, st.integers(1, 80))
def test_the_same_rollouts_pack_the_same(batch: list[Rollout], bound: int) -> None:
    for one, other in zip(pack(batch, bound), pack(list(batch), bound), strict=True):
        assert one.index == other.index
        assert torch.equal(one.ids_BT, other.ids_BT)
