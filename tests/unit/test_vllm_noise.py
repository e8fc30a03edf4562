"""The logits processor under vLLM's own types. Runs where vLLM is installed:

python -m pytest --noconftest tests/unit/test_vllm_noise.py
"""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from farflung.engine.noise import gumbel
from farflung.engine.seeded_rows import SEED, TEMPERATURE
from farflung.engine.vllm_noise import SeededNoise

VOCAB = 11


def params(seed: int, temperature: float = 1.0) -> SamplingParams:
    return SamplingParams(temperature=0, extra_args={SEED: seed, TEMPERATURE: temperature})


def expected(*places: tuple[int, int]) -> torch.Tensor:
    """The noise at each (seed, position), zeros for a negative seed."""
    rows = [torch.zeros(VOCAB) if seed < 0 else gumbel([seed], [position], VOCAB)[0] for seed, position in places]
    return torch.stack(rows)


def test_the_first_runner_moves_requests_between_rows() -> None:
    noise = SeededNoise(None, torch.device("cpu"))
    noise.update_state(None)
    told = [(0, params(7), [1], [4]), (1, SamplingParams(temperature=0), [1], []), (2, params(9), [1, 1, 1], [4, 5])]
    noise.update_state(BatchUpdate(3, removed=[], added=told, moved=[]))
    assert torch.equal(noise.apply(torch.zeros(3, VOCAB)), expected((7, 1), (-1, 0), (9, 4)))
    noise.update_state(BatchUpdate(3, removed=[], added=[], moved=[(0, 1, MoveDirectionality.SWAP)]))
    assert torch.equal(noise.apply(torch.zeros(3, VOCAB)), expected((-1, 0), (7, 1), (9, 4)))
    noise.update_state(BatchUpdate(2, removed=[0], added=[], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    assert torch.equal(noise.apply(torch.zeros(2, VOCAB)), expected((9, 4), (7, 1)))


def test_the_second_runner_says_whose_each_row_is() -> None:
    noise = SeededNoise(None, None)
    assert noise.add_request(3, params(7))
    assert noise.add_request(1, params(9, 0.5))
    assert not noise.add_request(0, SamplingParams(temperature=0))
    step = SimpleNamespace(expanded_idx_mapping=torch.tensor([1, 0, 3]), pos=torch.tensor([4, 9, 10]))
    assert torch.equal(noise.apply(torch.zeros(3, VOCAB), step), expected((9, 4), (-1, 0), (7, 10)))
    assert not noise.add_request(3, SamplingParams(temperature=0))
    assert torch.equal(noise.apply(torch.zeros(3, VOCAB), step), expected((9, 4), (-1, 0), (-1, 0)))


def test_a_seed_that_cannot_be_obeyed_is_refused() -> None:
    SeededNoise.validate_params(params(1))
    SeededNoise.validate_params(SamplingParams(temperature=1.0))
    with pytest.raises(ValueError, match="needs 0"):
        SeededNoise.validate_params(SamplingParams(temperature=1.0, extra_args={SEED: 1}))
    with pytest.raises(ValueError, match=SEED):
        SeededNoise.validate_params(params(-1))
