"""The learner: right log-probabilities, right gradients, the same bits twice, and nothing a worker says counts."""

import hashlib
import itertools
import math
import random
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from farflung.engine.base import Request  # noqa: E402
from farflung.engine.local import LocalEngine  # noqa: E402
from farflung.learner import chunked_logp, forward  # noqa: E402
from farflung.learner.loss import Objective  # noqa: E402
from farflung.learner.optimise import Learner, Optimisation  # noqa: E402
from farflung.learner.pack import Rollout, Segment, pack  # noqa: E402
from farflung.learner.policy import Policy  # noqa: E402
from farflung.numerics import devices  # noqa: E402
from farflung.protocol.errors import ConfigError  # noqa: E402
from second_device import DEVICES  # noqa: E402


def rollouts(count: int = 12, *, claim=None, temperature: float = 1.0) -> list[Rollout]:
    """Random rollouts of several lengths, some with two turns; `claim(k)` is the worker's logp of its k tokens."""
    rng = random.Random(5)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(2, 32) for _ in range(length))

    found = []
    for k in range(count):
        segments = [Segment("prompt", ids(4 + k % 3)), Segment("model", ids(5 + k % 5))]
        if k % 4 == 0:
            segments += [Segment("env", ids(3)), Segment("model", ids(4))]
        tokens = sum(len(segment.ids) for segment in segments if segment.source == "model")
        found.append(Rollout(tuple(segments), rng.gauss(0, 1), temperature, claim and claim(tokens)))
    return found


def digest(learner: Learner) -> str:
    sha = hashlib.sha256()
    for name, tensor in learner.policy.masters():
        sha.update(name.encode() + tensor.cpu().numpy().tobytes())
    return sha.hexdigest()


def plain_logp(policy: Policy, rollout: Rollout, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of each model token, by the model's own logits over one rollout alone."""
    ids = torch.tensor([[token for segment in rollout.segments for token in segment.ids]], device=policy.device)
    is_model = torch.tensor([segment.source == "model" for segment in rollout.segments for _ in segment.ids])[1:]
    whole = (policy.model(ids).logits[0] / temperature).log_softmax(-1)[:-1]
    logp = whole.gather(-1, ids[0, 1:, None])[:, 0]
    return logp[is_model], -(whole.exp() * whole).sum(-1)[is_model]


def in_groups(count: int = 3, size: int = 4) -> list[Rollout]:
    """Groups of rollouts that share a prompt, of uneven lengths."""
    rng = random.Random(6)
    found = []
    for _ in range(count):
        prompt = Segment("prompt", tuple(rng.randrange(2, 32) for _ in range(rng.randrange(6, 12))))
        for _ in range(size):
            ids = tuple(rng.randrange(2, 32) for _ in range(rng.randrange(1, 9)))
            found.append(Rollout((prompt, Segment("model", ids)), rng.gauss(0, 1), 0.7))
    return found


WAYS = list(itertools.product((1 << 25, 32 * 3), (True, False), ("linear head", "own head")))


@pytest.mark.parametrize(
    ("slicing", "is_shared", "kind", "place"),
    [*((*way, "cpu") for way in WAYS), *((*way, place) for way in (WAYS[4], WAYS[7]) for place in DEVICES[1:])],
)
def test_logp_and_entropy_are_those_of_the_whole_softmax(
    tiny_qwen, monkeypatch, slicing, is_shared, kind, place
) -> None:
    policy = Policy(tiny_qwen().to(place))
    assert policy.can_share
    for module in (chunked_logp, forward):
        monkeypatch.setattr(module, "blocks", lambda device: devices.blocks(device)._replace(head_logits=slicing))
    monkeypatch.setattr(policy, "_kind", forward.Kind(has_linear_head=kind == "linear head", can_share=True))
    batch = [replace(one, temperature=0.7) for one in (*rollouts(), *in_groups())]
    for micro in pack(batch, 64, is_shared=is_shared):
        logp_BT, entropy_BT = (found.detach().cpu() for found in policy.logp_entropy_BT(micro))
        for b, index in enumerate(micro.index):
            logp, entropy = (found.detach().cpu() for found in plain_logp(policy, batch[index], 0.7))
            torch.testing.assert_close(logp_BT[b][micro.mask_BT[b]], logp, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(entropy_BT[b][micro.mask_BT[b]], entropy, atol=1e-4, rtol=1e-4)
        assert not logp_BT[~micro.mask_BT].any()


@pytest.mark.parametrize("entropy", [0.0, 0.01])
def test_a_shared_prompt_changes_neither_loss_nor_gradient(tiny_qwen, monkeypatch, device, entropy: float) -> None:
    def found(*, is_shared: bool, kept: int = 1 << 26, is_checkpointed: bool = False) -> tuple[float, torch.Tensor]:
        monkeypatch.setattr(chunked_logp, "_PROBABILITIES_KEPT", kept)
        learner = Learner(
            Policy(tiny_qwen().to(device), is_checkpointed=is_checkpointed),
            Optimisation(lr=1e-9, max_grad_norm=1e9, objective=Objective(entropy=entropy)),
        )
        metrics = learner.step(pack(in_groups(), 200, is_shared=is_shared))
        return metrics.loss, torch.cat([parameter.grad.flatten() for parameter in learner.policy.model.parameters()])

    plain_loss, plain = found(is_shared=False)
    for settings in ({}, {"kept": 0}, {"kept": 0, "is_checkpointed": True}):
        loss, gradient = found(is_shared=True, **settings)
        assert loss == pytest.approx(plain_loss, abs=1e-6)
        torch.testing.assert_close(gradient, plain, atol=1e-5, rtol=1e-3)


def test_the_gradient_is_that_of_the_plain_softmax(tiny_qwen, device) -> None:
    batch = in_groups()

    def gradient(logp_of) -> torch.Tensor:
        policy = Policy(tiny_qwen().to(device))
        logp_of(policy).backward()
        return torch.cat([parameter.grad.flatten() for parameter in policy.model.parameters()])

    fused = gradient(
        lambda policy: sum((policy.logp_BT(m) * m.adv_B[:, None].to(device)).sum() for m in pack(batch, 100))
    )
    plain = gradient(lambda policy: sum(plain_logp(policy, one, 0.7)[0].sum() * one.advantage for one in batch))
    torch.testing.assert_close(fused, plain, atol=1e-4, rtol=1e-3)


def test_entropy_has_the_gradient_that_autograd_finds() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(5, 8, generator=generator), torch.randn(11, 8, generator=generator)
    bias, temperature = torch.randn(11, generator=generator), torch.tensor([0.5, 1.0, 1.5, 0.7, 1.0])
    leaves = [tensor.double().requires_grad_() for tensor in (hidden, weight, bias)]
    token = torch.arange(5)
    score = (torch.nn.functional.linear(*leaves) / temperature[:, None]).log_softmax(1)
    (score.gather(1, token[:, None]).sum() + 3 * -(score.exp() * score).sum()).backward()
    mine = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    logp, entropy = chunked_logp.token_logp(*mine, token, temperature)
    (logp.sum() + 3 * entropy.sum()).backward()
    for leaf, other in zip(leaves, mine, strict=True):
        torch.testing.assert_close(other.grad, leaf.grad.float(), atol=1e-4, rtol=1e-4)


def test_a_head_that_caps_its_logits_is_left_to_the_model() -> None:
    from transformers import AutoModelForCausalLM, Gemma2Config

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma2Config(**shape, num_key_value_heads=1, head_dim=8, vocab_size=32, final_logit_softcapping=0.1)
    policy = Policy(AutoModelForCausalLM.from_config(config))
    assert not policy._kind.has_linear_head
    batch = in_groups()
    for micro in pack(batch, 200, is_shared=policy.can_share):
        logp_BT = policy.logp_BT(micro)
        for b, index in enumerate(micro.index):
            logp, _ = plain_logp(policy, batch[index], 0.7)
            torch.testing.assert_close(logp_BT[b][micro.mask_BT[b]], logp, atol=1e-4, rtol=1e-4)


def test_a_recurrent_model_is_fed_one_rollout_a_row() -> None:
    from transformers import AutoModelForCausalLM, MambaConfig

    config = MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=32, state_size=4)
    policy = Policy(AutoModelForCausalLM.from_config(config))
    assert not policy.can_share


def test_two_runs_from_the_same_state_end_in_the_same_bits(tiny_qwen, device) -> None:
    def run() -> str:
        learner = Learner(Policy(tiny_qwen().to(device)), Optimisation(lr=1e-3, warmup_steps=2, minibatches=2))
        for _ in range(3):
            learner.step(pack(rollouts(), 64))
        return digest(learner)

    assert run() == run()
    assert not torch.are_deterministic_algorithms_enabled()


def has_no_deterministic_kernel(_module: object, _args: object, hidden: torch.Tensor) -> torch.Tensor:
    """An operation that is an error for torch where such kernels are insisted on; it changes nothing."""
    place = torch.zeros((), dtype=torch.long, device=hidden.device)
    return hidden + hidden.detach().clone().put_(place, hidden.detach().flatten()[0]) - hidden.detach()


@pytest.mark.filterwarnings("ignore:put_ does not have a deterministic implementation")
def test_an_operation_without_a_deterministic_kernel_stops_no_run(tiny_qwen, caplog) -> None:
    """And the step that was begun anew counts once."""
    learners = [Learner(Policy(tiny_qwen()), Optimisation(lr=1e-3, minibatches=2)) for _ in range(2)]
    learners[1].policy.model.lm_head.register_forward_hook(has_no_deterministic_kernel)
    taken = [[learner.step(pack(rollouts(), 64)) for _ in range(2)] for learner in learners]
    assert [learner.determinism.is_strict for learner in learners] == [True, False]
    assert [learner.updates for learner in learners] == [4, 4]
    assert [one.tokens for one in taken[0]] == [one.tokens for one in taken[1]]
    assert taken[1][1].loss == pytest.approx(taken[0][1].loss, abs=1e-5)
    assert caplog.text.count("may give other weights: put_ does not have") == 1


def test_what_workers_claim_changes_no_weight(tiny_qwen, device) -> None:
    def run(claim) -> tuple[str, float]:
        learner = Learner(Policy(tiny_qwen().to(device)), Optimisation(lr=1e-3, minibatches=2))
        metrics = [learner.step(pack(rollouts(claim=claim), 64)) for _ in range(2)]
        return digest(learner), metrics[0].mismatch_kl

    rng = random.Random(1)
    silent, no_kl = run(None)
    noisy, kl = run(lambda tokens: tuple(rng.uniform(-30, 0) for _ in range(tokens)))
    hostile, hostile_kl = run(lambda tokens: (math.nan, math.inf, -math.inf) + (1e30,) * (tokens - 3))
    assert silent == noisy == hostile
    assert no_kl == 0
    assert kl > 1
    assert math.isfinite(hostile_kl)


def test_the_first_update_has_ratio_one_and_later_ones_keep_the_old_logp(tiny_qwen, device) -> None:
    learner = Learner(Policy(tiny_qwen().to(device)), Optimisation(lr=1e-3))
    first = learner.step(pack(rollouts(), 64))
    assert (first.ratio_mean, first.ratio_max, first.clip_fraction) == (1.0, 1.0, 0.0)
    assert first.tokens == sum(int(micro.mask_BT.sum()) for micro in pack(rollouts(), 64))
    several = Learner(Policy(tiny_qwen().to(device)), Optimisation(lr=1e-2, minibatches=3))
    later = several.step(pack(rollouts(), 40))
    assert several.updates == 3
    assert later.ratio_max > 1.0
    assert 0 < later.clip_fraction < 1


def test_behaviour_logp_may_come_from_retained_weights(tiny_qwen, device) -> None:
    packed = pack(rollouts(), 64)
    with torch.no_grad():
        behaviour = [Policy(tiny_qwen(seed=1)).logp_BT(micro) for micro in packed]
    stale = Learner(Policy(tiny_qwen().to(device)), Optimisation(lr=1e-3, importance_cap=1.5))
    metrics = stale.step(packed, behaviour)
    assert 0 < metrics.importance < 1.5
    assert metrics.ratio_max == 1.0
    fresh = Learner(Policy(tiny_qwen().to(device)), Optimisation(lr=1e-3))
    assert fresh.step(packed).importance == 1.0
    assert digest(fresh) != digest(stale)
    with torch.no_grad():
        own = [Policy(tiny_qwen().to(device)).logp_BT(micro) for micro in packed]
    same = Learner(Policy(tiny_qwen().to(device)), Optimisation(lr=1e-3))
    same.step(packed, own)
    assert digest(same) == digest(fresh)


def test_what_is_known_from_before_the_step_is_not_found_again(tiny_qwen, device) -> None:
    packed = pack(rollouts(), 40)
    with torch.no_grad():
        known = [Policy(tiny_qwen().to(device)).logp_BT(micro).cpu() for micro in packed]
    other = [logp_BT - 0.5 for logp_BT in known]
    holed = [known[0].masked_fill(packed[0].mask_BT, math.nan), *other[1:]]
    found = []
    for before in (None, known, other, holed):
        learner = Learner(Policy(tiny_qwen().to(device)), Optimisation(lr=1e-2, minibatches=3))
        learner.step(packed, before=before)
        found.append(digest(learner))
    assert found[1] == found[0]
    assert found[2] != found[0], "later updates are held to what they are told"
    assert found[3] == found[0], "where one is missing, all are found"


def test_a_reference_holds_the_policy_back(tiny_qwen, device) -> None:
    def moved(weight: float) -> float:
        learner = Learner(
            Policy(tiny_qwen().to(device)),
            Optimisation(lr=1e-3, objective=Objective(kl=weight)),
            reference=Policy(tiny_qwen().to(device)),
        )
        return [learner.step(pack(rollouts(), 200)) for _ in range(6)][-1].kl

    assert moved(0.0) > 2 * moved(10.0) > 0


def test_microbatches_do_not_change_the_step(tiny_qwen, device) -> None:
    def gradient(tokens: int) -> tuple[float, float]:
        metrics = Learner(Policy(tiny_qwen().to(device)), Optimisation(lr=1e-3)).step(pack(rollouts(), tokens))
        return metrics.loss, metrics.grad_norm

    assert gradient(40) == pytest.approx(gradient(10_000), rel=1e-4)


def test_rewarded_tokens_become_likelier(tiny_qwen, device) -> None:
    learner = Learner(Policy(tiny_qwen().to(device)), Optimisation(lr=1e-3, warmup_steps=3))
    packed = pack(rollouts(), 200)

    def gain() -> float:
        with torch.no_grad():
            return sum(float((learner.policy.logp_BT(m) * m.adv_B[:, None].to(device)).sum()) for m in packed)

    before = gain()
    rates = [learner.step(packed).lr for _ in range(5)]
    assert gain() > before
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 1e-3])


def test_nothing_to_train_on_leaves_the_weights_alone(tiny_qwen, device) -> None:
    learner = Learner(Policy(tiny_qwen().to(device)))
    before = digest(learner)
    assert learner.step([]).tokens == 0
    assert digest(learner) == before


def test_what_is_published_is_what_an_engine_loads(tiny_qwen, device) -> None:
    policy = Policy(tiny_qwen(seed=4).to(device))
    published = dict(policy.tensors())
    assert "lm_head.weight" not in published
    assert {tensor.dtype for tensor in published.values()} == {torch.bfloat16}
    engine = LocalEngine(tiny_qwen().to(torch.bfloat16))
    engine.load(published.items())
    request = Request((3, 4, 5), 7, 1.0, 12)
    direct = LocalEngine(tiny_qwen(seed=4).to(torch.bfloat16)).generate([request])
    assert engine.generate([request]) == direct


def test_bfloat16_compute_keeps_float32_masters(tiny_qwen, device) -> None:
    learner = Learner(Policy(tiny_qwen().to(device), compute_dtype=torch.bfloat16), Optimisation(lr=1e-3))
    exact = Learner(Policy(tiny_qwen().to(device)), Optimisation(lr=1e-3))
    packed = pack(rollouts(), 64)
    assert learner.step(packed).grad_norm == pytest.approx(exact.step(packed).grad_norm, rel=0.1)
    assert {parameter.dtype for parameter in learner.policy.model.parameters()} == {torch.float32}


def test_bfloat16_compute_sees_the_weights_that_are_published(tiny_qwen, device) -> None:
    packed = pack(rollouts(), 64)

    def moved(*, is_dithered: bool) -> tuple[float, float]:
        """How far the policy has gone in a few small steps, and how far it is from what it publishes (mean squares)."""
        torch.manual_seed(0)
        model = tiny_qwen().bfloat16()
        policy = Policy(model, compute_dtype=torch.bfloat16, is_dithered=is_dithered)
        first = logp(policy)
        learner = Learner(policy, Optimisation(lr=4e-5))
        for _ in range(4):
            learner.step(packed)
        policy.is_dithered = True
        published = tiny_qwen()
        published.load_state_dict({name: tensor.float() for name, tensor in policy.tensors()}, strict=False)
        there = logp(Policy(published, compute_dtype=torch.bfloat16))
        return float((there - first).square().mean()), float((there - logp(policy)).square().mean())

    def logp(policy: Policy) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([policy.logp_BT(micro)[micro.mask_BT] for micro in packed])

    gone, off = moved(is_dithered=True)
    assert off < gone / 16
    assert moved(is_dithered=False)[1] > 3 * off, "rounded to nearest the policy in training stands still"


def test_attention_by_plain_products_is_as_exact_as_the_kernel(tiny_qwen, monkeypatch) -> None:
    packed = pack(in_groups(), 64)

    def logp(compute_dtype: torch.dtype) -> torch.Tensor:
        policy = Policy(tiny_qwen(), compute_dtype=compute_dtype)
        with torch.no_grad():
            return torch.cat([policy.logp_BT(micro)[micro.mask_BT] for micro in packed])

    exact, plain = logp(torch.float32), logp(torch.bfloat16)
    monkeypatch.setattr(forward, "_PLAIN_SCORES", 0)
    kernels = logp(torch.bfloat16)
    assert not torch.equal(plain, kernels), "these rows are short enough"
    assert (plain - exact).square().mean() < 1.5 * (kernels - exact).square().mean() < 0.01


def test_a_missing_model_is_one_clear_sentence(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no such model can be had") as caught:
        Policy.from_pretrained(tmp_path / "absent")
    assert "\n" not in str(caught.value)
