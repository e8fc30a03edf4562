"""Whatever is sent is either near the truth or fails: for any bytes, any activations, any scale."""

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from farflung.protocol.errors import Malformed
from farflung.protocol.fingerprint import NUMBERS, STEP, pack, signs, unpack
from farflung.trust.fingerprint_distance import FARTHEST, distance, is_far

WIDTH = 96
NONCES = st.binary(min_size=32, max_size=32).map(bytes.hex)
SEEDS = st.integers(0, 2**32)


def sketch(nonce: str, fed: np.ndarray) -> np.ndarray:
    """The numbers (K,) of activations (T, D), as the page on the protocol has them."""
    unit = fed / np.linalg.norm(fed, axis=1, keepdims=True)
    made = signs(nonce, fed.shape[1], len(fed)).astype(np.float64)
    return (np.einsum("td,tdk->k", unit, made) / len(fed) ** 0.5).astype(np.float32)


@given(st.binary(max_size=40), SEEDS)
def test_any_bytes_have_a_distance_and_what_is_malformed_has_the_farthest(sent: bytes, seed: int) -> None:
    seen = np.random.default_rng(seed).normal(size=NUMBERS).astype(np.float32)
    found = distance(sent, seen)
    try:
        unpack(sent)
        assert 0 <= found <= 8
    except Malformed:
        assert found == FARTHEST
        assert is_far(found, 1.0)


@given(st.binary(min_size=NUMBERS, max_size=NUMBERS), NONCES, SEEDS)
def test_bytes_chosen_without_the_nonce_are_far(sent: bytes, nonce: str, seed: int) -> None:
    assume(b"\x80" not in sent)
    fed = np.random.default_rng(seed).normal(size=(1, WIDTH))
    assert distance(sent, sketch(nonce, fed)) > 0.4


@given(NONCES, SEEDS, st.integers(1, 16), st.floats(1e-3, 1e3))
def test_the_scale_of_activations_says_nothing(nonce: str, seed: int, positions: int, scale: float) -> None:
    fed = np.random.default_rng(seed).normal(size=(positions, WIDTH))
    assert distance(pack(sketch(nonce, scale * fed)), sketch(nonce, fed)) < STEP / 2


@given(NONCES, SEEDS, st.integers(1, 16), st.floats(0.1, 1.0))
def test_the_distance_estimates_how_far_the_activations_are_apart(
    nonce: str, seed: int, positions: int, error: float
) -> None:
    rng = np.random.default_rng(seed)
    fed = rng.normal(size=(positions, WIDTH))
    other = fed + error * rng.normal(size=fed.shape)
    units = [one / np.linalg.norm(one, axis=1, keepdims=True) for one in (fed, other)]
    truth = np.sqrt(np.mean(np.sum((units[0] - units[1]) ** 2, axis=1)))
    assert 0.45 * truth < distance(pack(sketch(nonce, other)), sketch(nonce, fed)) < 1.7 * truth + STEP
