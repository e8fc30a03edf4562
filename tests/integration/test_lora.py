"""Adapters alone are trained; what is published and what is resumed is as with all weights."""

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from adapting import MORE, SHAPE, batch, learner
from farflung.learner import checkpoint
from farflung.learner.lora import adapters
from farflung.learner.policy import Policy
from farflung.learner.ranks import Ranks
from farflung.protocol.errors import ConfigError


def test_it_begins_as_the_base_model_and_trains_nothing_but_adapters() -> None:
    base, adapted = learner(0), learner(4)
    first = dict(base.policy.masters())
    masters = {name: tensor.clone() for name, tensor in adapted.policy.masters()}
    assert list(masters) == list(first)
    assert all(torch.equal(masters[name], first[name]) for name in first)
    trained = {id(parameter) for group in adapted.optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for _, parameter in adapters(adapted.policy.model)}
    micro = batch(1)
    before = adapted.policy.logp_BT(micro[0]).detach()
    adapted.step(micro)
    after = dict(adapted.policy.masters())
    changed = {name for name in first if not torch.equal(after[name], first[name])}
    assert changed == {name for name in first if "proj" in name}
    for name in changed:
        assert torch.linalg.matrix_rank(after[name] - first[name], rtol=1e-3) <= 4
    gain = ((adapted.policy.logp_BT(micro[0]).detach() - before).sum(1) * micro[0].adv_B).sum()
    assert gain > 0, "what was rewarded is likelier"


def test_a_checkpoint_goes_on_bit_for_bit_and_holds_what_is_published(tmp_path: Path, device) -> None:
    one = learner(4, device)
    one.step(batch(1))
    saved = checkpoint.save(one, 1, tmp_path)
    two = learner(4, device)
    assert checkpoint.load(two, saved.path) == 1
    for each in (one, two):
        each.step(batch(2))
    pairs = zip(one.policy.masters(), two.policy.masters(), strict=True)
    assert all(torch.equal(first, second) for (_, first), (_, second) in pairs)
    whole = dict(checkpoint.published(saved.path, is_dithered=False))
    three = learner(4, device)
    checkpoint.load(three, saved.path)
    assert all(torch.equal(tensor.cpu(), whole[name]) for name, tensor in three.policy.tensors())
    with pytest.raises(ConfigError, match="adapter tensors"):
        checkpoint.load(learner(0, device), saved.path)


def test_several_processes_are_refused() -> None:
    with pytest.raises(ConfigError, match="works in one process"):
        Policy(Qwen3ForCausalLM(Qwen3Config(**SHAPE, **MORE)), ranks=Ranks(0, 2), lora_rank=4)
