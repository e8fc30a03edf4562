"""One of several processes of test_ranks.py: trains a small model and writes what it came to."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM

from farflung.learner import checkpoint
from farflung.learner.loss import Objective
from farflung.learner.optimise import Learner, Optimisation
from farflung.learner.pack import Rollout, Segment, pack
from farflung.learner.policy import Policy
from farflung.learner.ranks import join

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
MORE = {"vocab_size": 32, "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.2}


def batch(seed: int) -> list[Rollout]:
    """Five groups of four rollouts each."""
    torch.manual_seed(seed)
    found = []
    for _ in range(5):
        prompt = Segment("prompt", tuple(torch.randint(2, 32, (7,)).tolist()))
        for _ in range(4):
            ids = tuple(torch.randint(2, 32, (int(torch.randint(1, 9, ())),)).tolist())
            found.append(Rollout((prompt, Segment("model", ids)), float(torch.randn(())), 1.0))
    return found


def main(out: Path, steps: int, resume: str) -> None:
    torch.set_num_threads(1)
    ranks = join()
    torch.manual_seed(0)
    policy = Policy(Qwen3ForCausalLM(Qwen3Config(**SHAPE, **MORE)), ranks=ranks)
    learner = Learner(policy, Optimisation(lr=3e-3, minibatches=2, objective=Objective(entropy=0.01)))
    first = checkpoint.load(learner, Path(resume)) if resume else 0
    losses = []
    for step in range(first, first + steps):
        metrics = learner.step(pack(batch(step), 40))
        losses.append([metrics.loss, metrics.grad_norm, metrics.entropy, metrics.tokens])
    saved = checkpoint.save(learner, first + steps, out / "checkpoints")
    weights = {name: tensor.flatten()[:50].tolist() for name, tensor in policy.masters()}
    if ranks.rank == 0:
        (out / "found.json").write_text(json.dumps({"losses": losses, "weights": weights, "path": str(saved.path)}))
    if not ranks.is_alone:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "")
