"""The run's noise against vLLM's own kernels, which Triton interprets. Runs where both are installed:

python -m pytest --noconftest tests/unit/test_vllm_kernels.py
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed here")
if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"
import torch
import triton
import triton.language as tl

from farflung.engine import noise


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    """vLLM's file of kernels by itself: on a CPU vLLM itself keeps Triton from them."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    utilities = ModuleType("vllm.triton_utils")
    vars(utilities).update(tl=tl, triton=triton, tldevice=None, HAS_TRITON=True)
    sys.modules["vllm.triton_utils"] = utilities
    path = Path(str(spec.origin)).parent / "v1" / "worker" / "gpu" / "sample" / "gumbel.py"
    found = importlib.util.spec_from_file_location("vllm_gumbel", path)
    assert found is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_hash_uniform_and_noise_are_those_of_the_kernels(kernels: ModuleType) -> None:
    mine = sys.modules[__name__]
    vars(mine).update(
        hash32=kernels.murmur3_hash32, uniform32=kernels.murmur3_uniform32, log1p=kernels._log1p_neg_stable
    )
    rng = np.random.default_rng(0)
    seeds, positions = rng.integers(0, 2**53, 64), rng.integers(0, 2**17, 64)
    vocab = 1024
    hashes = torch.empty(64, vocab, dtype=torch.int64)
    values = torch.empty(64, vocab)
    for row in range(64):
        seed, place = (torch.tensor([x[row]], dtype=torch.int64) for x in (seeds, positions))
        _row[(1,)](seed, place, hashes[row], values[row], vocab)
    expected = noise.bits_numpy(seeds, positions, vocab)
    assert np.array_equal(hashes.numpy().astype(np.uint32), expected)
    np.testing.assert_allclose(values.numpy(), noise.gumbel_numpy(expected), atol=3e-6)


@triton.jit
def _row(seed_ptr, place_ptr, hash_ptr, value_ptr, WIDTH: tl.constexpr):
    seed, place = tl.load(seed_ptr), tl.load(place_ptr)
    token = tl.arange(0, WIDTH)
    tl.store(hash_ptr + token, hash32(seed, place, token).to(tl.int64))  # noqa: F821
    value = -tl.log(-log1p(uniform32(seed, place, token)))  # noqa: F821
    tl.store(value_ptr + token, value)
