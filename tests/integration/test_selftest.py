"""A node tries its arithmetic on what the trainer made before it works, and says what to expect."""

import asyncio
import contextlib
import hashlib
import logging
from types import SimpleNamespace

import msgspec
import pytest
import torch

from farflung.audits import self_test
from farflung.config import WorkerSection
from farflung.engine.base import Request
from farflung.engine.local import LocalEngine
from farflung.net.node_stats import NodeStats
from farflung.protocol import errors, seeds, wire
from farflung.protocol import messages as m
from farflung.protocol.identity import Key
from farflung.rollouts.lanes import Lanes
from farflung.tasks.create_run import admitted
from farflung.trust.evidence import to_json
from farflung.trust.profiles import load_profile
from farflung.worker import Worker

PROFILE = load_profile("torch-cpu-fp32")
PROMPTS = [[3, 4, 5, 6], [7, 8], [9, 10, 11], [12, 13], [14], [15, 16], [17, 18, 19], [20]]


def made_by(engine: LocalEngine, temperature: float = 1.0) -> m.SelfTest:
    """What a trainer with this engine makes."""
    items = []
    for seed, prompt in enumerate(PROMPTS):
        (done,) = engine.generate([Request(tuple(prompt), seed, temperature, 32)])
        packed = {"prompt_ids": wire.pack_ids(prompt), "ids": wire.pack_ids(done.ids)}
        packed |= {"logp": wire.pack_floats(done.logp)}
        items.append(m.SelfTestItem(seed=seed, max_new_tokens=32, **packed))
    return m.SelfTest(step=0, temperature=temperature, profiles={PROFILE.name: to_json(PROFILE)}, items=items)


def noisy(model, scale: float):
    """The same model with so much noise in its weights: arithmetic of another kind."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * parameter.std() * torch.randn_like(parameter)
    return model


def test_the_same_arithmetic_has_less_noise_than_the_profile_allows(tiny_qwen) -> None:
    test = made_by(LocalEngine(tiny_qwen()))
    tried = self_test.attempt(LocalEngine(tiny_qwen()), test, PROFILE)
    assert tried.factor <= 1
    assert tried.tokens > 50
    assert "its work will pass" in tried.text


def test_undeclared_bfloat16_and_worse_are_told_before_they_work(tiny_qwen) -> None:
    test = made_by(LocalEngine(tiny_qwen()))
    factors = [self_test.attempt(LocalEngine(noisy(tiny_qwen(), scale)), test, PROFILE).factor for scale in (0.03, 0.3)]
    assert factors[0] > 3
    assert factors == sorted(factors)


def worker_with(engine, tmp_path, test: m.SelfTest | None, **settings) -> Worker:
    """A worker that has joined, with what a coordinator would say of a self-test."""
    worker = Worker("http://127.0.0.1:1", Key.make(), tmp_path, WorkerSection(**settings))

    async def get(path: str, kind: type) -> m.SelfTest:
        if test is None:
            raise errors.NotFound("none")
        return test

    info = SimpleNamespace(profile=PROFILE.name, profiles={PROFILE.name: admitted(PROFILE)})
    worker.session = SimpleNamespace(
        info=info, client=SimpleNamespace(get=get), path=lambda rest: rest,
        stats=NodeStats(),
    )  # fmt: skip
    worker.engine, worker.profile = engine, PROFILE.name
    worker.lanes = Lanes(lambda: engine, 1, 0, 1, lambda: False)
    return worker


def test_a_worker_says_what_to_expect_once(tiny_qwen, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    worker = worker_with(LocalEngine(tiny_qwen()), tmp_path, made_by(LocalEngine(tiny_qwen())))
    for _ in range(3):
        asyncio.run(worker.try_numerics("0" * 64))
    said = [one.getMessage() for one in caplog.records if one.getMessage().startswith("self-test")]
    assert len(said) == 1
    assert "that of profile torch-cpu-fp32: its work will pass" in said[0]


def test_a_worker_refuses_to_start_where_it_would_be_ejected_unless_told_otherwise(tiny_qwen, tmp_path) -> None:
    test, broken = made_by(LocalEngine(tiny_qwen())), LocalEngine(noisy(tiny_qwen(), 0.3))
    with pytest.raises(errors.ConfigError, match=r"would be ejected.*--profile.*--ignore-self-test"):
        asyncio.run(worker_with(broken, tmp_path, test).try_numerics("0" * 64))
    asyncio.run(worker_with(broken, tmp_path, test, ignore_self_test=True).try_numerics("0" * 64))


HALF = load_profile("torch-cpu-bf16")


def tensor_float(model):
    """Products whose inputs keep ten bits behind the point, as on a card that uses TF32."""

    def cut(x: torch.Tensor) -> torch.Tensor:
        return (x.view(torch.int32) + (1 << 12) & -(1 << 13)).view(torch.float32)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = cut(module.weight.data)
            module.register_forward_pre_hook(lambda _, inputs: (cut(inputs[0].contiguous()),))
    return model


def half_sums(model):
    """Products that are summed in bfloat16 a part at a time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = zip(x.split(16, -1), self.weight.split(16, -1), strict=True)
        total = torch.zeros((), dtype=torch.bfloat16)
        for one, weight in parts:
            total = total + torch.nn.functional.linear(one, weight).bfloat16()
        return total.float()

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = forward.__get__(module)
    return model


def other_order(model):
    """The same products, summed from the other end: another library."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x.flip(-1), self.weight.flip(-1))

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = forward.__get__(module)
    return model


@pytest.mark.parametrize(
    ("machine", "expected"), [(tensor_float, HALF.name), (half_sums, "refused"), (other_order, "")]
)
def test_a_class_of_machine_that_was_never_calibrated_is_put_under_a_profile_that_forgives_it(
    tiny_qwen, tmp_path, machine, expected: str
) -> None:
    test = made_by(LocalEngine(tiny_qwen().eval()))
    test = msgspec.structs.replace(test, profiles={one.name: to_json(one) for one in (PROFILE, HALF)})
    worker = worker_with(LocalEngine(machine(tiny_qwen().eval())), tmp_path, test)
    worker.session.info.profiles = {one.name: admitted(one) for one in (PROFILE, HALF)}
    refusal = pytest.raises(errors.ConfigError, match="would be ejected, honest or not")
    with refusal if expected == "refused" else contextlib.nullcontext():
        assert asyncio.run(worker.try_numerics("0" * 64)) == expected


def test_an_engine_with_other_weights_is_told_so(tiny_qwen, tmp_path) -> None:
    """A server that says that it loads and does not, or that has another model of the same shape."""
    test = made_by(LocalEngine(tiny_qwen().eval()))
    test = msgspec.structs.replace(test, profiles={one.name: to_json(one) for one in (PROFILE, HALF)})
    worker = worker_with(LocalEngine(tiny_qwen(seed=1).eval()), tmp_path, test)
    worker.session.info.profiles = {one.name: admitted(one) for one in (PROFILE, HALF)}
    with pytest.raises(errors.ConfigError, match="may hold other weights than the run's"):
        asyncio.run(worker.try_numerics("0" * 64))


def test_a_trainer_of_before_that_tells_no_log_probabilities_leaves_the_flips(tiny_qwen) -> None:
    test = made_by(LocalEngine(tiny_qwen().eval()))
    silent = msgspec.structs.replace(test, items=[msgspec.structs.replace(one, logp=b"") for one in test.items])
    tried = self_test.attempt(LocalEngine(tensor_float(tiny_qwen().eval())), silent, PROFILE)
    assert tried.noise == 0.0
    assert tried.is_forgiven, "in so few tokens it flips none"


def test_a_profile_of_another_device_or_of_quantised_weights_is_none_of_its_own(tiny_qwen, tmp_path) -> None:
    test = made_by(LocalEngine(tiny_qwen().eval()))
    wide = [
        msgspec.structs.replace(HALF, name="card", device="cuda"),
        msgspec.structs.replace(HALF, name="small", bits=8, quantiser="int8"),
    ]
    test = msgspec.structs.replace(test, profiles={one.name: to_json(one) for one in (PROFILE, *wide)})
    worker = worker_with(LocalEngine(tensor_float(tiny_qwen().eval())), tmp_path, test)
    worker.session.info.profiles = {one.name: admitted(one) for one in (PROFILE, *wide)}
    with pytest.raises(errors.ConfigError, match="would be ejected"):
        asyncio.run(worker.try_numerics("0" * 64))


def test_without_a_self_test_or_with_a_profile_that_the_papers_do_not_name_it_works(tiny_qwen, tmp_path) -> None:
    engine, test = LocalEngine(noisy(tiny_qwen(), 0.3)), made_by(LocalEngine(tiny_qwen()))
    asyncio.run(worker_with(engine, tmp_path, None).try_numerics("0" * 64))
    worker = worker_with(engine, tmp_path, test)
    worker.session.info.profiles = {PROFILE.name: msgspec.structs.replace(admitted(PROFILE), digest="0" * 64)}
    asyncio.run(worker.try_numerics("0" * 64))


def test_an_engine_that_cannot_tell_gaps_is_not_tried(tiny_qwen) -> None:
    class Blind(LocalEngine):
        def replay(self, items):
            raise errors.ConfigError("vLLM generates only")

    assert self_test.attempt(Blind(tiny_qwen()), made_by(LocalEngine(tiny_qwen())), PROFILE) is None


def test_a_coordinator_serves_it_with_seeds_that_derive_from_no_secret(make_house) -> None:
    house = make_house(trust={"self_test": 4, "canaries": 1})

    async def scenario(house) -> None:
        batch = await house.claim_step(0)
        assert len(batch.canaries) == 5
        await house.commit(batch, canaries=True)
        manifest = (await house.ctx.database.read(house.ctx.run_ctx.latest)).manifest
        line = house.line("anyone")
        test = await line.get(f"{house.path}/manifests/{manifest}/self-test", m.SelfTest)
        assert [one.seed for one in test.items] == [one.seed for one in batch.canaries[1:]]
        assert batch.canaries[0].seed not in {one.seed for one in test.items}
        public = hashlib.sha256(b"farflung self-test test").digest()
        first = seeds.number(seeds.derive(public, "self-test seed", 0, 0))
        assert test.items[0].seed == first, "anybody can compute it"
        (name,) = test.profiles
        assert hashlib.sha256(test.profiles[name]).hexdigest() == admitted(house.ctx.profiles.of(name)).digest
        with pytest.raises(errors.NotFound):
            await line.get(f"{house.path}/manifests/{'0' * 64}/self-test", m.SelfTest)

    house.run(scenario)
