"""Seeded Gumbel noise: a pure function of (seed, position, token id), the same integers on every device.

It is the noise of stock vLLM (0.31 and later, model runner V2), so that a server of it that runs no code of ours
samples as the run wants. One hash over four 32-bit words, Murmur3 x86_32 with hash seed 0 (A. Appleby, public domain):

    low and high half of the seed, position ──▶ state, 32 bits      once a row
    state, token id ──▶ h, 32 bits                                  a bijection of the token: no two share a hash
    u = high 16 bits · 2^-16 + (low 16 bits + 1/2) · 2^-32          float32, rounded once; 1 for the largest 128 of h
    g = -log(-log1p(-u))                                            float32, from -2.81 (where 1 - u is 2^-24) to 22.87

The position is that of the token which is fed to get the logits: P - 1 + t for token t of a completion after a prompt
of P tokens (`Request.first_position`). Large noise belongs to small h, where float32 keeps all 32 bits.
Sampling by `argmax(logits / T + g)` is exact sampling from softmax(logits / T) (Gumbel-max, Maddison et al. 2014).

Legend: B rows, V vocabulary, N picked tokens.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch

from farflung.numerics.devices import blocks

Integers = Sequence[int] | np.ndarray | torch.Tensor

_WORD, MIXED = (0xCC9E2D51, 0x1B873593), (0x85EBCA6B, 0xC2B2AE35)
ADDED, LENGTH = 0xE6546B64, 16
LARGEST = 1 - 2.0**-24
"""Of u, after it is rounded: the logarithm of 0 is not finite."""


def row_states(seed_B: Integers, position_B: Integers | int) -> np.ndarray:
    """What is left of seed and position in each row, uint32 (B,). Seeds may be negative: their low 64 bits count."""
    seed, position = _uint64(seed_B), _uint64(position_B)
    state_B = np.zeros(np.broadcast_shapes(seed.shape, position.shape), np.uint32)
    for word in (seed, seed >> np.uint64(32), position):
        state_B = _absorbed(state_B, scrambled(word.astype(np.uint32)))
    return state_B


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
    """The same noise before its second logarithm, exp(-g) = -log1p(-u), float32 (B, V) above 0.

    It goes into `out` if that is given: new memory costs as much as the noise.
    argmax(exp(logits / T) * exp(g)) is argmax(logits / T + g), and exp(logits / T) is needed for log-probabilities.
    """
    noise_BV = torch.empty(len(seed_B), vocab, device=device) if out is None else out
    for rows, hash_RV, spare_RV in _hashed_blocks(seed_B, position_B, vocab, noise_BV.device):
        _to_exponential_(noise_BV[rows], hash_RV, spare_RV)
    return noise_BV


def bits(seed_B: Integers, position_B: Integers | int, vocab: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The 32 hash bits of every token for each row, int32 (B, V) bit for bit equal to `bits_numpy`."""
    hash_BV = torch.empty(len(seed_B), vocab, dtype=torch.int32, device=device)
    for rows, hash_RV, _ in _hashed_blocks(seed_B, position_B, vocab, hash_BV.device):
        hash_BV[rows] = hash_RV
    return hash_BV


def bits_numpy(seed_B: Integers, position_B: Integers | int, vocab: int) -> np.ndarray:
    """The same as `bits` without torch arithmetic, uint32 (B, V)."""
    return _finished(row_states(seed_B, position_B)[:, None], np.arange(vocab, dtype=np.uint32))


def bits_at(seed_N: Integers, position_N: Integers | int, token_N: Integers) -> np.ndarray:
    """The 32 hash bits of one token each, uint32 (N,)."""
    return _finished(row_states(seed_N, position_N), _uint64(token_N).astype(np.uint32))


def gumbel_numpy(hash_: np.ndarray) -> np.ndarray:
    """Gumbel noise of uint32 hash bits, float32 of the same shape; equals torch's to 1e-6 relative."""
    high, low = (hash_ >> np.uint32(16)).astype(np.float32), (hash_ & np.uint32(0xFFFF)).astype(np.float32)
    uniform = high * np.float32(2.0**-16) + (low + np.float32(0.5)) * np.float32(2.0**-32)
    return -np.log(-np.log1p(-np.minimum(uniform, np.float32(LARGEST))))


def _uint64(values: Integers | int) -> np.ndarray:
    """Integers of any kind modulo 2^64; numpy refuses Python integers beyond int64 mixed with negative ones."""
    if isinstance(values, torch.Tensor):
        values = values.cpu().numpy()
    if isinstance(values, np.ndarray):
        return values.astype(np.uint64)
    if isinstance(values, int):
        return np.array([values & 0xFFFFFFFFFFFFFFFF], np.uint64)
    return np.array([int(value) & 0xFFFFFFFFFFFFFFFF for value in values], np.uint64)


def _rotated(x: np.ndarray, count: int) -> np.ndarray:
    return x << np.uint32(count) | x >> np.uint32(32 - count)


def scrambled(word: np.ndarray) -> np.ndarray:
    """A word of uint32 as the hash takes it in."""
    return _rotated(word * np.uint32(_WORD[0]), 15) * np.uint32(_WORD[1])


def _absorbed(state: np.ndarray, scrambled: np.ndarray) -> np.ndarray:
    return _rotated(state ^ scrambled, 13) * np.uint32(5) + np.uint32(ADDED)


def _finished(state: np.ndarray, token: np.ndarray) -> np.ndarray:
    x = _absorbed(state, scrambled(token)) ^ np.uint32(LENGTH)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(MIXED[0])
    x = (x ^ (x >> np.uint32(13))) * np.uint32(MIXED[1])
    return x ^ (x >> np.uint32(16))


@lru_cache(maxsize=8)
def _tokens(vocab: int, device: torch.device) -> torch.Tensor:
    """Every token id as the hash takes it in, int32 (V,): the same for all rows."""
    return torch.from_numpy(scrambled(np.arange(vocab, dtype=np.uint32)).view(np.int32)).to(device)


def _hashed_blocks(
    seed_B: Integers, position_B: Integers | int, vocab: int, device: torch.device
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield (slice of rows, int32 hash (R, V), spare (R, V)) block by block; both are reused, so use them at once.

    torch has no uint32 arithmetic, but int32 multiplies and adds wrap to the same bits, and a masked shift is the
    logical one. int64 with masks gives the same and takes 1.7 times as long.
    """
    state_B1 = torch.from_numpy(row_states(seed_B, position_B).view(np.int32)).to(device)[:, None]
    token_V = _tokens(vocab, device)
    height = min(len(seed_B), max(1, blocks(device).noise // vocab))
    x_RV, spare_RV = torch.empty(2, height, vocab, dtype=torch.int32, device=device)
    for start in range(0, len(seed_B), height):
        rows = slice(start, min(start + height, len(seed_B)))
        x, spare = x_RV[: rows.stop - start], spare_RV[: rows.stop - start]
        torch.bitwise_xor(token_V, state_B1[rows], out=x)
        _finish_(x, spare)
        yield rows, x, spare


def _finish_(x: torch.Tensor, spare: torch.Tensor) -> None:
    """From state ^ scrambled token to the hash, in place on int32."""
    _shifted_(x, 19, spare)
    x.bitwise_left_shift_(13).bitwise_or_(spare).mul_(5).add_(_signed(ADDED)).bitwise_xor_(LENGTH)
    for shift, multiplier in ((16, MIXED[0]), (13, MIXED[1]), (16, 1)):
        x.bitwise_xor_(_shifted_(x, shift, spare))
        if multiplier != 1:
            x.mul_(_signed(multiplier))


def _shifted_(x: torch.Tensor, count: int, out: torch.Tensor) -> torch.Tensor:
    """The bits of int32 to the right, zeros coming in."""
    return torch.bitwise_right_shift(x, count, out=out).bitwise_and_((1 << (32 - count)) - 1)


def _signed(x: int) -> int:
    return x - (x >> 31 << 32)


def _to_exponential_(out: torch.Tensor, hash_: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """-log1p(-u) of int32 hash bits, which are lost; `spare` is of their shape."""
    low = spare.view(torch.float32).copy_(hash_.bitwise_and(0xFFFF)).add_(0.5).mul_(-(2.0**-32))
    out.copy_(hash_.bitwise_right_shift_(16).bitwise_and_(0xFFFF)).mul_(-(2.0**-16)).add_(low)
    return out.clamp_(min=-LARGEST).log1p_().neg_()
