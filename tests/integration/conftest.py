"""Tiny random models, built from their configuration alone."""

from collections.abc import Callable

import pytest


@pytest.fixture
def tiny_qwen() -> Callable[..., object]:
    """A builder of Qwen3 models with 32 tokens, hidden size 64 and two layers; equal seeds give equal weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)

    def build(seed: int = 0, **changes: object) -> object:
        torch.manual_seed(seed)
        shape = {
            "vocab_size": 32,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,  # sharp enough that a wrong weight or mask changes what is sampled
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
        }
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**(shape | changes)))

    return build
