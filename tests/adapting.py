"""A model of two small layers with adapters, and batches to train it on."""

from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from farflung.learner.optimise import Learner, Optimisation
from farflung.learner.pack import MicroBatch, Rollout, Segment, pack
from farflung.learner.policy import Policy

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
MORE = {"vocab_size": 32, "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.2}


def learner(rank: int, device: str = "cpu", **options: Any) -> Learner:
    torch.manual_seed(0)
    policy = Policy(Qwen3ForCausalLM(Qwen3Config(**SHAPE, **MORE)).to(device), lora_rank=rank, **options)
    return Learner(policy, Optimisation(lr=3e-3))


def batch(seed: int) -> list[MicroBatch]:
    """Two groups of two rollouts."""
    torch.manual_seed(seed)
    rollouts = []
    for _ in range(2):
        prompt = Segment("prompt", tuple(torch.randint(2, 32, (7,)).tolist()))
        for advantage in (1.0, -1.0):
            rollouts.append(
                Rollout((prompt, Segment("model", tuple(torch.randint(2, 32, (6,)).tolist()))), advantage, 1.0)
            )
    return pack(rollouts, 64)
