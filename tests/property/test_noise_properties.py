"""The noise is a pure function: no batch, order, block or library changes it."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from farflung.engine import noise

seeds = st.integers(0, 2**64 - 1)
positions = st.integers(0, 2**32 - 1)
rows = st.lists(st.tuples(seeds, positions), min_size=1, max_size=6)


@settings(max_examples=50)
@given(rows, st.integers(1, 3000))
def test_a_row_does_not_depend_on_its_batch(pairs: list[tuple[int, int]], vocab: int) -> None:
    together = noise.bits_numpy([s for s, _ in pairs], [p for _, p in pairs], vocab)
    alone = np.stack([noise.bits_numpy([s], [p], vocab)[0] for s, p in pairs])
    assert np.array_equal(together, alone)


@settings(max_examples=50)
@given(rows, st.integers(1, 3000))
def test_torch_and_numpy_agree_bit_for_bit(pairs: list[tuple[int, int]], vocab: int) -> None:
    seed_B, position_B = [s for s, _ in pairs], [p for _, p in pairs]
    by_torch = noise.bits(seed_B, position_B, vocab).numpy().view(np.uint32)
    assert np.array_equal(by_torch, noise.bits_numpy(seed_B, position_B, vocab))


@settings(max_examples=100)
@given(seeds, seeds, positions)
def test_a_row_of_noise_follows_from_its_state(one: int, other: int, position: int) -> None:
    a, b = noise.row_states([one, other], position)
    rows = noise.bits_numpy([one, other], position, 50)
    assert (a == b) == np.array_equal(rows[0], rows[1])


@settings(max_examples=100)
@given(seeds, positions, st.integers(0, 2**31))
def test_noise_is_finite(seed: int, position: int, token: int) -> None:
    assert bool(np.isfinite(noise.gumbel_numpy(noise.bits_at([seed], [position], [token]))).all())
