"""What staleness costs: the demo's model trained on rollouts of a policy 0, 1, 2, 4 and 8 steps old.

    python bench/staleness.py [--quick] [--seeds 3] [--steps 24]

Everything happens in one process, in lockstep: step s trains on rollouts of policy s − 1 − k, its first k steps on more
rollouts of the base model. Each is run with importance weights (from log-probabilities of the weights that generated
the rollout) and with 8 also without. A curve is the mean reward that each policy's own fresh rollouts earn. Prints one
JSON object as its last line: per setting the curves' mean over all policies and over the last five, each seed apart.
`--quick` takes one seed and 12 steps of the same settings; the full command is `python bench/staleness.py`.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from farflung.engine.base import Request
from farflung.engine.local import LocalEngine
from farflung.envs.base import Task
from farflung.envs.sums import Sums
from farflung.learner.filters import is_informative
from farflung.learner.loss import advantages
from farflung.learner.optimise import Learner, Optimisation
from farflung.learner.pack import Rollout, Segment, lay, pack
from farflung.learner.policy import Policy
from farflung.rollouts import stale
from farflung.tasks.create_run import Model

BASE = Path(__file__).parents[1] / "examples" / "base"
SAMPLES, BUDGET = 16, 32
SETTINGS = ((0, True), (1, True), (2, True), (4, True), (8, True), (8, False))
"""Steps of staleness, and whether stale tokens are weighted."""
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Made:
    """One batch and the policy that it came from."""

    rollouts: list[Rollout]
    weights: Tensors
    reward: float


class World:
    """Model, tasks and an engine that generates."""

    def __init__(self, seed: int, groups: int) -> None:
        self.model, self.env, self.groups = Model(str(BASE)), Sums(), groups
        self.rng = random.Random(seed)
        self.tasks = list(islice(self.env.tasks("train"), 4096))
        self.engine = LocalEngine.from_folder(BASE, eos_ids=self.model.eos_ids, max_rows=256)

    def make(self, weights: Tensors, step: int) -> Made:
        """A batch of rollouts of these weights; groups without variance are left out of training."""
        self.engine.load(weights.items())
        chosen = self.rng.sample(self.tasks, self.groups)
        prompts = [tuple(self.model.prompt_ids(self.env.prompt(task))) for task in chosen]
        requests = [Request(p, self.rng.getrandbits(64), 1.0, BUDGET) for p in prompts for _ in range(SAMPLES)]
        done = [completion.ids for completion in self.engine.generate(requests) if completion is not None]
        rewards = [self._reward(chosen[k // SAMPLES], ids) for k, ids in enumerate(done)]
        rollouts: list[Rollout] = []
        for g, prompt in enumerate(prompts):
            part = slice(g * SAMPLES, (g + 1) * SAMPLES)
            if is_informative(rewards[part]):
                shares = advantages(torch.tensor([rewards[part]]))[0].tolist()
                rollouts += [
                    Rollout((Segment("prompt", prompt), Segment("model", ids)), share, 1.0, None, step)
                    for ids, share in zip(done[part], shares, strict=True)
                ]
        return Made(rollouts, weights, statistics.fmean(rewards))

    def _reward(self, task: Task, ids: tuple[int, ...]) -> float:
        said = self.model.tokenizer.decode(list(ids), skip_special_tokens=True)
        return self.env.score(task, said).reward


def curve(seed: int, staleness: int, steps: int, groups: int, lr: float, *, is_weighted: bool) -> list[float]:
    """The mean reward of each policy's fresh rollouts, the base model's first."""
    world = World(seed, groups)
    learner = Learner(Policy.from_pretrained(BASE), Optimisation(lr=lr))
    waiting: deque[Made] = deque()
    rewards: list[float] = []
    for policy in range(steps):
        weights = dict(learner.policy.tensors())
        made = [world.make(weights, policy) for _ in range(staleness + 1 if policy == 0 else 1)]
        rewards.append(statistics.fmean(one.reward for one in made))
        waiting.extend(made)
        _train(world, learner, waiting.popleft(), policy, is_weighted=is_weighted)
    return rewards


def _train(world: World, learner: Learner, batch: Made, present: int, *, is_weighted: bool) -> None:
    packed = pack(batch.rollouts, 8192)
    logp: stale.Logp = {}
    if is_weighted and (which := stale.stale(batch.rollouts, present)):
        world.engine.load(batch.weights.items())
        for indices in which.values():
            logp |= stale.behaviour(world.engine.model, batch.rollouts, indices, 8192)
    if packed:
        learner.step(packed, lay(packed, logp))


def main() -> int:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="one seed, 12 steps")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--steps", type=int, default=24)
    made.add_argument("--groups", type=int, default=8)
    made.add_argument("--lr", type=float, default=3e-4)
    asked = made.parse_args()
    seeds, steps = (1, 12) if asked.quick else (asked.seeds, asked.steps)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for staleness, is_weighted in SETTINGS:
        curves = [
            curve(seed, staleness, steps, asked.groups, asked.lr, is_weighted=is_weighted) for seed in range(seeds)
        ]
        row = {
            "staleness": staleness,
            "is_weighted": is_weighted,
            "mean": [round(statistics.fmean(one), 3) for one in curves],
            "last_five": [round(statistics.fmean(one[-5:]), 3) for one in curves],
            "curve": [round(statistics.fmean(values), 3) for values in zip(*curves, strict=True)],
        }
        rows.append(row)
        sys.stderr.write(f"{time.strftime('%X')} {json.dumps(row)}\n")
    sys.stdout.write(json.dumps({"steps": steps, "lr": asked.lr, "settings": rows}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
