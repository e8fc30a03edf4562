"""Seeded noise and the picks that it makes, in MLX: the integers of `engine/noise.py`, computed where the logits are.

Legend: B rows, V vocabulary.
"""

from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

from farflung.engine.base import Request
from farflung.engine.noise import ADDED, LARGEST, LENGTH, MIXED, row_states, scrambled


def bits(state_B: np.ndarray, vocab: int) -> mx.array:
    """The 32 hash bits of every token for each row, uint32 (B, V), from the rows' states."""
    x = _tokens(vocab) ^ mx.array(state_B)[:, None]
    x = (((x << 13) | (x >> 19)) * 5 + _word(ADDED)) ^ LENGTH
    x = (x ^ (x >> 16)) * _word(MIXED[0])
    x = (x ^ (x >> 13)) * _word(MIXED[1])
    return x ^ (x >> 16)


def gumbel(state_B: np.ndarray, vocab: int) -> mx.array:
    """Noise of every token for each row, float32 (B, V)."""
    hash_BV = bits(state_B, vocab)
    high_BV, low_BV = (hash_BV >> 16).astype(mx.float32), (hash_BV & 0xFFFF).astype(mx.float32)
    uniform_BV = high_BV * 2.0**-16 + (low_BV + 0.5) * 2.0**-32
    return -mx.log(-mx.log1p(-mx.minimum(uniform_BV, LARGEST)))


def pick(logits_BV: mx.array, requests: Sequence[Request], said: int) -> tuple[mx.array, mx.array]:
    """The token of each row that comes after `said` ones, and its log-probability at the sampling temperature."""
    temperature_B1 = np.array([[one.temperature] for one in requests], np.float32)
    is_sampled_B1 = mx.array((temperature_B1 > 0).astype(np.float32))
    policy_BV = logits_BV.astype(mx.float32) / mx.array(np.where(temperature_B1 > 0, temperature_B1, 1))
    state_B = row_states([one.seed for one in requests], [one.first_position + said for one in requests])
    token_B = mx.argmax(policy_BV + gumbel(state_B, policy_BV.shape[1]) * is_sampled_B1, axis=-1)
    sent_B = mx.take_along_axis(policy_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B, sent_B - mx.logsumexp(policy_BV, axis=-1)


@lru_cache(maxsize=8)
def _tokens(vocab: int) -> mx.array:
    """Every token id as the hash takes it in, uint32 (V,): the same for all rows."""
    return mx.array(scrambled(np.arange(vocab, dtype=np.uint32)))


def _word(value: int) -> mx.array:
    return mx.array(value, mx.uint32)
