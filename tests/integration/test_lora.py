"""Adapters alone are trained; what is published and what is resumed is as with all weights."""

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from adapting import MORE, SHAPE, batch, learner
from farflung.learner import checkpoint
from farflung.learner.lora import LoraLinear, adapters
from farflung.protocol.errors import ConfigError


def test_it_begins_as_the_base_model_and_trains_nothing_but_adapters(device) -> None:
    base, adapted = learner(0, device, is_dithered=True), learner(4, device)
    first = dict(base.policy.tensors())
    published = {name: tensor.clone() for name, tensor in adapted.policy.tensors()}
    assert list(published) == list(first)
    assert all(torch.equal(published[name], first[name]) for name in first)
    trained = {id(parameter) for group in adapted.optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for _, parameter in adapters(adapted.policy.model)}
    micro = batch(1)
    before = adapted.policy.logp_BT(micro[0]).detach()
    adapted.step(micro)
    after = dict(adapted.policy.tensors())
    changed = {name for name in first if not torch.equal(after[name], first[name])}
    assert changed == {name for name in first if "proj" in name}
    gain = ((adapted.policy.logp_BT(micro[0]).detach() - before).sum(1) * micro[0].adv_B.to(device)).sum()
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


@pytest.mark.parametrize("is_held", [True, False])
def test_in_bfloat16_it_computes_with_what_is_published_and_learns_as_in_float32(is_held: bool, device) -> None:
    exact, short = learner(4, device), learner(4, device, compute_dtype=torch.bfloat16)
    for layer in short.policy.model.modules():
        if isinstance(layer, LoraLinear):
            layer.is_held = is_held
    for number in range(4):
        wanted, found = exact.step(batch(number)), short.step(batch(number))
        assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=0.1)
    worker = Qwen3ForCausalLM(Qwen3Config(**SHAPE, **MORE)).to(device, torch.bfloat16)
    worker.model.rotary_emb.to(torch.float32)
    worker.model.rotary_emb.inv_freq = short.policy.model.model.rotary_emb.inv_freq
    worker.load_state_dict(dict(short.policy.tensors()), strict=False)
    worker.tie_weights()
    ids = torch.arange(2, 20)[None].to(device)
    with torch.no_grad():
        assert torch.equal(short.policy.model(input_ids=ids).logits, worker(input_ids=ids).logits)
    for (_, one), (_, other) in zip(adapters(exact.policy.model), adapters(short.policy.model), strict=True):
        assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.9


def test_no_gradient_of_a_whole_matrix_is_kept(device) -> None:
    one = learner(4, device, compute_dtype=torch.bfloat16)
    one.step(batch(1))
    assert {name for name, parameter in one.policy.model.named_parameters() if parameter.grad is not None} == {
        name for name, _ in adapters(one.policy.model)
    }
