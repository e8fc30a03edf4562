"""What the trainer does between a batch and a commit, without a coordinator."""

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("torch")
import torch
from tests.conftest import named, settings

from farflung.learner.pack import Rollout, Segment
from farflung.protocol import messages as m
from farflung.rollouts.checker import Checker
from farflung.trainer import Trainer

FRESH, STALE = "fresh", "stale"


def trainer_of(folder: Path, **learn) -> Trainer:
    return Trainer("http://127.0.0.1:9", named("trainer"), settings(folder, learn=learn))


def batch_of(step: int, groups: dict[str, int]) -> m.Batch:
    """One rollout to a group, named like it; `groups` has the step that each was leased at."""
    return m.Batch(
        step=step,
        seen_groups=8,
        seen_reward=0.75,
        secret_commitment="0" * 64,
        probe="0" * 64,
        temperature=1.0,
        groups=[
            m.BatchGroup(group=n, step=s, manifest="0" * 64, prompt_ids=b"", rollouts=[one(n)])
            for n, s in groups.items()
        ],
    )


def one(name: str) -> m.BatchRollout:
    return m.BatchRollout(rollout=name, submission="0" * 64, sample=0, reward=1.0, seed=1, is_audited=False)


def rollout(step: int) -> Rollout:
    return Rollout((Segment("prompt", (1, 2)), Segment("model", (3, 4))), 1.0, 1.0, None, step)


@pytest.mark.parametrize(("cap", "minibatches", "known"), [(2.0, 2, {0, 1}), (0.0, 2, {0}), (0.0, 1, set())])
def test_stale_rollouts_are_weighed_unless_they_count_as_they_are(tmp_path, cap, minibatches, known) -> None:
    """What the tripwire saw serves several updates where it is fresh, and importance weights where it is stale."""
    trainer = trainer_of(tmp_path, importance_cap=cap, minibatches=minibatches)
    batch, rollouts = batch_of(2, {FRESH: 1, STALE: 0}), [rollout(1), rollout(0)]
    checker = Checker(None, trainer.config, None, None, trainer._retry_when_disk_full)
    checker._seen = {FRESH: torch.tensor([-1.0, -2.0]), STALE: torch.tensor([-3.0, -4.0])}
    logp = asyncio.run(checker.behaviour(batch, rollouts))
    assert logp.keys() == known


def test_a_step_whose_groups_are_each_alike_says_its_reward(tmp_path) -> None:
    told = trainer_of(tmp_path)._metrics(batch_of(1, {}), None)
    assert (told["reward"], told["informative_share"]) == (0.75, 0.0)
