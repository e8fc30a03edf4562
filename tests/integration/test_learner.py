"""The learner: right log-probabilities, right gradients, the same bits twice, and nothing a worker says counts."""

import hashlib
import math
import random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from farflung.engine.base import Request  # noqa: E402
from farflung.engine.local import LocalEngine  # noqa: E402
from farflung.learner import policy as policy_module  # noqa: E402
from farflung.learner.optimise import Learner, Optimisation  # noqa: E402
from farflung.learner.pack import Rollout, Segment, pack  # noqa: E402
from farflung.learner.policy import Policy  # noqa: E402
from farflung.protocol.errors import ConfigError  # noqa: E402


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
        sha.update(name.encode() + tensor.numpy().tobytes())
    return sha.hexdigest()


def test_logp_and_entropy_are_those_of_the_whole_softmax(tiny_qwen, monkeypatch) -> None:
    policy = Policy(tiny_qwen())
    for slicing in (1 << 25, 32 * 3):
        monkeypatch.setattr(policy_module, "_LOGITS_AT_ONCE", slicing)
        for micro in pack(rollouts(temperature=0.7), 64):
            logp_BT, entropy_BT = policy.logp_entropy_BT(micro)
            whole = (policy.model(micro.ids_BT).logits / 0.7).log_softmax(-1)[:, :-1]
            expected = whole.gather(-1, micro.ids_BT[:, 1:, None])[..., 0] * micro.mask_BT[:, 1:]
            torch.testing.assert_close(logp_BT[:, 1:], expected, atol=1e-4, rtol=1e-4)
            entropy = -(whole.exp() * whole).sum(-1) * micro.mask_BT[:, 1:]
            torch.testing.assert_close(entropy_BT[:, 1:], entropy.detach(), atol=1e-4, rtol=1e-4)
            assert not logp_BT[~micro.mask_BT].any()


def test_slices_and_activation_checkpoints_keep_the_gradient(tiny_qwen, monkeypatch) -> None:
    def gradient(is_checkpointed: bool) -> torch.Tensor:
        policy = Policy(tiny_qwen(), is_checkpointed=is_checkpointed)
        for micro in pack(rollouts(), 64):
            policy.logp_BT(micro).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in policy.model.parameters()])

    whole = gradient(is_checkpointed=False)
    monkeypatch.setattr(policy_module, "_LOGITS_AT_ONCE", 32 * 3)
    torch.testing.assert_close(gradient(is_checkpointed=True), whole, atol=1e-4, rtol=1e-4)


def test_two_runs_from_the_same_state_end_in_the_same_bits(tiny_qwen) -> None:
    def run() -> str:
        learner = Learner(Policy(tiny_qwen()), Optimisation(lr=1e-3, warmup_steps=2, minibatches=2))
        for _ in range(3):
            learner.step(pack(rollouts(), 64))
        return digest(learner)

    assert run() == run()
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_workers_claim_changes_no_weight(tiny_qwen) -> None:
    def run(claim) -> tuple[str, float]:
        learner = Learner(Policy(tiny_qwen()), Optimisation(lr=1e-3, minibatches=2))
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


def test_the_first_update_has_ratio_one_and_later_ones_keep_the_old_logp(tiny_qwen) -> None:
    learner = Learner(Policy(tiny_qwen()), Optimisation(lr=1e-3))
    first = learner.step(pack(rollouts(), 64))
    assert (first.ratio_mean, first.ratio_max, first.clip_fraction) == (1.0, 1.0, 0.0)
    assert first.tokens == sum(int(micro.mask_BT.sum()) for micro in pack(rollouts(), 64))
    several = Learner(Policy(tiny_qwen()), Optimisation(lr=1e-2, minibatches=3))
    later = several.step(pack(rollouts(), 40))
    assert several.updates == 3
    assert later.ratio_max > 1.0
    assert 0 < later.clip_fraction < 1


def test_behaviour_logp_may_come_from_retained_weights(tiny_qwen) -> None:
    packed = pack(rollouts(), 64)
    with torch.no_grad():
        behaviour = [Policy(tiny_qwen(seed=1)).logp_BT(micro) for micro in packed]
    assert Learner(Policy(tiny_qwen())).step(packed, behaviour).ratio_max > 1.5


def test_microbatches_do_not_change_the_step(tiny_qwen) -> None:
    def gradient(tokens: int) -> tuple[float, float]:
        metrics = Learner(Policy(tiny_qwen()), Optimisation(lr=1e-3)).step(pack(rollouts(), tokens))
        return metrics.loss, metrics.grad_norm

    assert gradient(40) == pytest.approx(gradient(10_000), rel=1e-4)


def test_rewarded_tokens_become_likelier(tiny_qwen) -> None:
    learner = Learner(Policy(tiny_qwen()), Optimisation(lr=1e-3, warmup_steps=3))
    packed = pack(rollouts(), 200)

    def gain() -> float:
        with torch.no_grad():
            return sum(float((learner.policy.logp_BT(m) * m.adv_B[:, None]).sum()) for m in packed)

    before = gain()
    rates = [learner.step(packed).lr for _ in range(5)]
    assert gain() > before
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 1e-3])


def test_nothing_to_train_on_leaves_the_weights_alone(tiny_qwen) -> None:
    learner = Learner(Policy(tiny_qwen()))
    before = digest(learner)
    assert learner.step([]).tokens == 0
    assert digest(learner) == before


def test_what_is_published_is_what_an_engine_loads(tiny_qwen) -> None:
    policy = Policy(tiny_qwen(seed=4))
    published = dict(policy.tensors())
    assert "lm_head.weight" not in published
    assert {tensor.dtype for tensor in published.values()} == {torch.bfloat16}
    engine = LocalEngine(tiny_qwen().to(torch.bfloat16))
    engine.load(published.items())
    request = Request((3, 4, 5), 7, 1.0, 12)
    direct = LocalEngine(tiny_qwen(seed=4).to(torch.bfloat16)).generate([request])
    assert engine.generate([request]) == direct


def test_bfloat16_compute_keeps_float32_masters(tiny_qwen) -> None:
    learner = Learner(Policy(tiny_qwen(), compute_dtype=torch.bfloat16), Optimisation(lr=1e-3))
    exact = Learner(Policy(tiny_qwen()), Optimisation(lr=1e-3))
    packed = pack(rollouts(), 64)
    assert learner.step(packed).grad_norm == pytest.approx(exact.step(packed).grad_norm, rel=0.1)
    assert {parameter.dtype for parameter in learner.policy.model.parameters()} == {torch.float32}


def test_a_missing_model_is_one_clear_sentence(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no model at") as caught:
        Policy.from_pretrained(tmp_path / "absent")
    assert "\n" not in str(caught.value)
