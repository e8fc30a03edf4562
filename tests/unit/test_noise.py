"""The noise: the same bits in torch and numpy, uniform in every direction, finite at the extremes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from farflung.engine import noise

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "noise_vectors.json").read_text())
"""Of (seed, position, token). The kernels of vLLM 0.31 to 0.33, run by an interpreter, give the same."""
SEEDS = [0, 1, 2, 2**32, 2**63, 2**64 - 1, 0x0123456789ABCDEF]


def chi2_of_bytes(bits: np.ndarray, shift: int) -> float:
    """Deviation from uniform of one byte of the hash, in standard deviations of the chi-squared statistic (255 df)."""
    counts = np.bincount((bits.ravel() >> np.uint32(shift)) & np.uint32(255), minlength=256)
    expected = bits.size / 256
    return float((((counts - expected) ** 2 / expected).sum() - 255) / np.sqrt(2 * 255))


def test_fixed_vectors() -> None:
    seeds, positions, tokens = ([vector[name] for vector in VECTORS] for name in ("seed", "position", "token"))
    hashes = noise.bits_at(seeds, positions, tokens)
    assert hashes.tolist() == [vector["hash"] for vector in VECTORS]
    expected = pytest.approx([vector["gumbel"] for vector in VECTORS], abs=3e-6)
    assert noise.gumbel_numpy(hashes).tolist() == expected
    by_torch = noise._to_exponential_(torch.empty(len(hashes)), *torch.from_numpy(hashes.view(np.int32)).repeat(2, 1))
    assert by_torch.log().neg().tolist() == expected


def test_torch_and_numpy_give_the_same_bits_across_blocks() -> None:
    positions = [0, 1, 2, 1000, 2**31, 2**32 - 1, 17]
    by_numpy = noise.bits_numpy(SEEDS, positions, 49_157)
    by_torch = noise.bits(SEEDS, positions, 49_157).numpy().view(np.uint32)
    assert np.array_equal(by_numpy, by_torch)


def test_gumbel_agrees_between_libraries_to_a_millionth() -> None:
    by_numpy = noise.gumbel_numpy(noise.bits_numpy(SEEDS, 5, 10_000))
    np.testing.assert_allclose(noise.gumbel(SEEDS, 5, 10_000).numpy(), by_numpy, rtol=1e-6, atol=1e-6)


def test_seeds_may_be_lists_arrays_or_tensors_and_wrap_at_64_bits() -> None:
    expected = noise.bits_numpy([2**64 - 1, 5], 3, 8)
    assert np.array_equal(noise.bits_numpy(torch.tensor([-1, 5]), torch.tensor([3, 3]), 8), expected)
    assert np.array_equal(noise.bits_numpy(np.array([2**64 - 1, 5], np.uint64), 3, 8), expected)
    assert np.array_equal(noise.bits_numpy([-1, 2**64 + 5], [3, 3], 8), expected)


def every_hash() -> np.ndarray:
    """Hashes that reach every float32 near both ends, and many between, ascending."""
    ends = np.arange(2**16, dtype=np.uint32)
    return np.concatenate(
        [ends, np.arange(2**16, 2**32 - 2**16, 2**10, dtype=np.uint32), ends + np.uint32(2**32 - 2**16)]
    )


def test_the_float_map_is_finite_and_falls_from_22_9_to_minus_2_8() -> None:
    hashes = every_hash()
    noise_ = noise.gumbel_numpy(hashes)
    assert np.isfinite(noise_).all()
    assert (np.diff(noise_) <= 0).all()
    by_torch = noise._to_exponential_(torch.empty(len(hashes)), *torch.from_numpy(hashes.view(np.int32)).repeat(2, 1))
    np.testing.assert_allclose(by_torch.log().neg().numpy(), noise_, rtol=1e-6, atol=2e-6)
    assert float(noise_[0]) == pytest.approx(22.8739, abs=1e-4)
    assert float(noise_[-1]) == pytest.approx(-2.8115, abs=1e-4)


def test_in_one_row_no_two_tokens_share_a_hash() -> None:
    assert len(np.unique(noise.bits_numpy([7], 3, 200_000))) == 200_000


@pytest.mark.parametrize("shift", [0, 9, 16, 24])
@pytest.mark.parametrize(
    ("seeds", "positions", "vocab"),
    [
        ([7], [3], 100_000),
        ([7] * 20_000, range(20_000), 5),
        (range(20_000), [0] * 20_000, 5),
        ([k << 32 for k in range(20_000)], [0] * 20_000, 5),
        ([k << 44 for k in range(20_000)], [1] * 20_000, 5),
    ],
    ids=["tokens", "positions", "seeds", "high-seeds", "top-bits"],
)
def test_bits_are_uniform(seeds: list[int], positions: list[int], vocab: int, shift: int) -> None:
    assert abs(chi2_of_bytes(noise.bits_numpy(list(seeds), list(positions), vocab), shift)) < 4


def test_neighbouring_seeds_positions_and_tokens_are_uncorrelated() -> None:
    rows = noise.gumbel_numpy(noise.bits_numpy(list(range(64)) * 4, [p for p in range(4) for _ in range(64)], 2_000))
    correlation = np.corrcoef(rows)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5.5 / np.sqrt(2_000)
    shifted = np.corrcoef(rows[:, 1:].ravel(), rows[:, :-1].ravel())[0, 1]
    assert abs(shifted) < 5 / np.sqrt(rows.size)


def test_every_input_bit_flips_half_of_the_output() -> None:
    rng = np.random.default_rng(5)
    seeds = rng.integers(0, 2**63, 2_000, dtype=np.uint64)
    positions, tokens = rng.integers(0, 2**16, 2_000), rng.integers(0, 2**17, 2_000)
    bits = noise.bits_at(seeds, positions, tokens)
    one = np.uint64(1)
    flipped = [noise.bits_at(seeds ^ (one << np.uint64(k)), positions, tokens) for k in range(64)]
    flipped += [noise.bits_at(seeds, positions ^ (1 << k), tokens) for k in range(16)]
    flipped += [noise.bits_at(seeds, positions, tokens ^ (1 << k)) for k in range(17)]
    for other in flipped:
        share = np.unpackbits((bits ^ other).view(np.uint8)).reshape(-1, 8).mean()
        assert share == pytest.approx(0.5, abs=0.015)


def test_argmax_of_logits_plus_noise_samples_from_the_softmax() -> None:
    logits_V = torch.tensor([0.0, 1.0, 2.0, -1.0])
    picks = (logits_V + noise.gumbel(list(range(40_000)), 0, 4)).argmax(dim=1)
    shares = torch.bincount(picks, minlength=4) / 40_000
    assert torch.allclose(shares, logits_V.softmax(0), atol=0.01)
