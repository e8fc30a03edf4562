"""Shapes of models that people run: as much of their config.json as says how large they are."""

import json
from typing import Any

_SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip


def shape(kind: str, *sizes: int, is_tied: bool = False, **more: Any) -> dict[str, Any]:
    """The fields of a config.json, sizes in the order of `_SIZES`."""
    common = {"model_type": kind, "tie_word_embeddings": is_tied, "max_position_embeddings": 32_768}
    return dict(zip(_SIZES, sizes, strict=True)) | common | more


MODELS = {
    "SmolLM2-135M": shape("llama", 30, 576, 1536, 49_152, 9, 3, is_tied=True),
    "Qwen2.5-1.5B": shape("qwen2", 28, 1536, 8960, 151_936, 12, 2, is_tied=True),
    "Qwen2.5-3B": shape("qwen2", 36, 2048, 11_008, 151_936, 16, 2, is_tied=True),
    "Qwen2.5-7B": shape("qwen2", 28, 3584, 18_944, 152_064, 28, 4),
    "Qwen3-8B": shape("qwen3", 36, 4096, 12_288, 151_936, 32, 8, head_dim=128),
    "Llama-3.1-8B": shape("llama", 32, 4096, 14_336, 128_256, 32, 8),
    "Mistral-7B-v0.1": shape("mistral", 32, 4096, 14_336, 32_000, 32, 8, sliding_window=4096),
    "Mistral-7B-v0.3": shape("mistral", 32, 4096, 14_336, 32_768, 32, 8),
    "Gemma-2-9B": shape("gemma2", 42, 3584, 14_336, 256_000, 16, 8, is_tied=True, head_dim=256, sliding_window=4096),
    "Qwen2.5-14B": shape("qwen2", 48, 5120, 13_824, 152_064, 40, 8),
    "Qwen2.5-32B": shape("qwen2", 64, 5120, 27_648, 152_064, 40, 8),
    "Llama-3.3-70B": shape("llama", 80, 8192, 28_672, 128_256, 64, 8),
}


def config_json(name: str) -> bytes:
    """As the model's folder has it."""
    return json.dumps(MODELS[name]).encode()
