"""The best score of each row, and the log-sum-exp of all its scores: passes over B x V values that take no new memory.

For 64 rows of 49,152 scores on two cores torch's `argmax` takes 3 to 4 ms where numpy's takes 0.7, and `logsumexp`
5 ms, most of it for new pages, where it takes 2 in a buffer that is used again.

Legend: B rows, V vocabulary.
"""

import numpy as np
import torch


def policy_scores(logits_BV: torch.Tensor, temperature_B: np.ndarray) -> torch.Tensor:
    """Logits in float32, divided by each row's temperature, or as they are where it is 0; no device is asked."""
    divisor_B = np.where(temperature_B > 0, temperature_B, 1).astype(np.float32)
    score_BV = logits_BV.float()
    return score_BV if (divisor_B == 1).all() else score_BV / torch.from_numpy(divisor_B).to(score_BV.device)[:, None]


def with_noise(noise_BV: torch.Tensor, policy_BV: torch.Tensor, temperature_B: np.ndarray) -> torch.Tensor:
    """Scores with noise, in the place of the noise; without it for rows of temperature 0."""
    if not (temperature_B > 0).all():
        noise_BV *= torch.from_numpy((temperature_B > 0).astype(np.float32)).to(noise_BV.device)[:, None]
    return noise_BV.add_(policy_BV)


def silenced(exponential_BV: torch.Tensor, temperature_B: np.ndarray) -> torch.Tensor:
    """exp(-noise), in place, 1 for rows of temperature 0 (or for K positions of each row, KBV)."""
    if not (temperature_B > 0).all():
        exponential_BV.masked_fill_(torch.from_numpy(temperature_B <= 0).to(exponential_BV.device)[:, None], 1.0)
    return exponential_BV


def best(score_BV: torch.Tensor) -> torch.Tensor:
    """The index of each row's highest score, the first of equals (B,)."""
    if score_BV.device.type == "cpu" and score_BV.dtype == torch.float32:
        return torch.from_numpy(score_BV.numpy().argmax(axis=-1))
    return score_BV.argmax(dim=-1)


def log_sum_exp(score_BV: torch.Tensor, buffer_BV: torch.Tensor) -> torch.Tensor:
    """log of the sum of exp(score) of each row (B,); `buffer_BV` is overwritten."""
    top_B1 = score_BV.amax(dim=-1, keepdim=True)
    sum_B = torch.sub(score_BV, top_B1, out=buffer_BV).exp_().sum(dim=-1)
    return sum_B.log_().add_(top_B1[:, 0])
