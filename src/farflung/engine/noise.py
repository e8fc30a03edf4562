"""Seeded Gumbel noise: a pure function of (seed, position, token id), the same integers on every device.

A counter-based generator: nothing is drawn in sequence, so a verifier computes any one value by itself.

    (seed: 64 bits, position: 32 bits) --row_keys--> (a, b), a bijection of the seed for any one position
    h = mix(mix(token ^ a) + b)                      32 bits
    u = (floor(h / 512) + 1/2) * 2^-23               23 bits: with 24 the largest h rounds to u = 1, its noise to inf
    g = -log(-log(u))                                float32, from -2.8 to 16.7

`mix` is the 32-bit finaliser with xor-shifts 16, 15, 16 and the multipliers of C. Wellons' hash prospector
("lowbias32", bias 0.17 of the ideal); two rounds, each with its own key, part the rows from one another.
Sampling by `argmax(logits / T + g)` is exact sampling from softmax(logits / T) (Gumbel-max, Maddison et al. 2014).

Legend: B rows, V vocabulary, N picked tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch

from farflung.numerics.devices import blocks

Integers = Sequence[int] | np.ndarray | torch.Tensor

_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
_ROW_SALTS = (0x9E3779B9, 0x85EBCA6B)


def row_keys(seed_B: Integers, position_B: Integers | int) -> tuple[np.ndarray, np.ndarray]:
    """The two 32-bit keys (a, b) of each row, uint32 (B,). Seeds may be negative: their low 64 bits count."""
    seed = _uint64(seed_B)
    position = _uint64(position_B).astype(np.uint32)
    low, high = seed.astype(np.uint32), (seed >> np.uint64(32)).astype(np.uint32)
    a_B = _mix_numpy(low ^ _mix_numpy(high ^ _mix_numpy(position ^ np.uint32(_ROW_SALTS[0]))))
    b_B = _mix_numpy(high ^ _mix_numpy(a_B ^ np.uint32(_ROW_SALTS[1])))
    return a_B, b_B


def gumbel(
    seed_B: Integers, position_B: Integers | int, vocab: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Noise of every token for each row, float32 (B, V)."""
    return exponential(seed_B, position_B, vocab, device).log_().neg_()


def exponential(
    seed_B: Integers,
    position_B: Integers | int,
    vocab: int,
    device: torch.device | str = "cpu",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same noise before its second logarithm, exp(-g) = -log(u), float32 (B, V) above 0.

    It goes into `out` if that is given: new memory costs as much as the noise.
    argmax(exp(logits / T) * exp(g)) is argmax(logits / T + g), and exp(logits / T) is needed for log-probabilities.
    """
    noise_BV = torch.empty(len(seed_B), vocab, device=device) if out is None else out
    for rows, hash_RV in _hashed_blocks(seed_B, position_B, vocab, noise_BV.device):
        _to_exponential(noise_BV[rows].copy_(_top23(hash_RV)))
    return noise_BV


def bits(seed_B: Integers, position_B: Integers | int, vocab: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The 32 hash bits of every token for each row, int32 (B, V) bit for bit equal to `bits_numpy`."""
    hash_BV = torch.empty(len(seed_B), vocab, dtype=torch.int32, device=device)
    for rows, hash_RV in _hashed_blocks(seed_B, position_B, vocab, hash_BV.device):
        hash_BV[rows] = hash_RV
    return hash_BV


def bits_numpy(seed_B: Integers, position_B: Integers | int, vocab: int) -> np.ndarray:
    """The same as `bits` without torch arithmetic, uint32 (B, V)."""
    a_B, b_B = row_keys(seed_B, position_B)
    return _hash_numpy(np.arange(vocab, dtype=np.uint32), a_B[:, None], b_B[:, None])


def bits_at(seed_N: Integers, position_N: Integers | int, token_N: Integers) -> np.ndarray:
    """The 32 hash bits of one token each, uint32 (N,)."""
    a_N, b_N = row_keys(seed_N, position_N)
    return _hash_numpy(_uint64(token_N).astype(np.uint32), a_N, b_N)


def gumbel_numpy(hash_: np.ndarray) -> np.ndarray:
    """Gumbel noise of uint32 hash bits, float32 of the same shape; equals torch's to 1e-6 relative."""
    uniform = ((hash_ >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    return -np.log(-np.log(uniform))


def _uint64(values: Integers | int) -> np.ndarray:
    """Integers of any kind modulo 2^64; numpy refuses Python integers beyond int64 mixed with negative ones."""
    if isinstance(values, torch.Tensor):
        values = values.cpu().numpy()
    if isinstance(values, np.ndarray):
        return values.astype(np.uint64)
    if isinstance(values, int):
        return np.array([values & 0xFFFFFFFFFFFFFFFF], np.uint64)
    return np.array([int(value) & 0xFFFFFFFFFFFFFFFF for value in values], np.uint64)


def _mix_numpy(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(_MULTIPLIERS[0])
    x = (x ^ (x >> np.uint32(15))) * np.uint32(_MULTIPLIERS[1])
    return x ^ (x >> np.uint32(16))


def _hash_numpy(token: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _mix_numpy(_mix_numpy(token ^ a) + b)


def _hashed_blocks(seed_B: Integers, position_B: Integers | int, vocab: int, device: torch.device):
    """Yield (slice of rows, int32 hash (R, V)) block by block; the buffer is reused, so consume it at once.

    torch has no uint32 arithmetic, but int32 multiplies and adds wrap to the same bits, and a masked shift is the
    logical one. int64 with masks gives the same and takes 1.7 times as long.
    """
    a_B1, b_B1 = (torch.from_numpy(key.view(np.int32)).to(device)[:, None] for key in row_keys(seed_B, position_B))
    token_V = torch.arange(vocab, dtype=torch.int32, device=device)
    height = min(len(seed_B), max(1, blocks(device).noise // vocab))
    x_RV, spare_RV = torch.empty(2, height, vocab, dtype=torch.int32, device=device)
    for start in range(0, len(seed_B), height):
        rows = slice(start, min(start + height, len(seed_B)))
        x, spare = x_RV[: rows.stop - start], spare_RV[: rows.stop - start]
        torch.bitwise_xor(token_V, a_B1[rows], out=x)
        _mix_torch_(x, spare)
        x.add_(b_B1[rows])
        _mix_torch_(x, spare)
        yield rows, x


def _mix_torch_(x: torch.Tensor, spare: torch.Tensor) -> None:
    """`_mix_numpy` in place on int32."""
    for shift, multiplier in ((16, _MULTIPLIERS[0]), (15, _MULTIPLIERS[1]), (16, 1)):
        torch.bitwise_right_shift(x, shift, out=spare)
        x.bitwise_xor_(spare.bitwise_and_((1 << (32 - shift)) - 1))
        if multiplier != 1:
            x.mul_(multiplier - (multiplier >> 31 << 32))


def _top23(hash_: torch.Tensor) -> torch.Tensor:
    """The top 23 of 32 bits, as an int32 between 0 and 2^23 - 1."""
    return (hash_ >> 9).bitwise_and_((1 << 23) - 1)


def _to_gumbel(top23: torch.Tensor) -> torch.Tensor:
    """Gumbel noise, in place, of the top bits given as float32; exact up to the two logarithms."""
    return _to_exponential(top23).log_().neg_()


def _to_exponential(top23: torch.Tensor) -> torch.Tensor:
    """-log(u), in place."""
    return top23.add_(0.5).mul_(2.0**-23).log_().neg_()
