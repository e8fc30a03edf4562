"""A profile made anew from audits: of a class of machines that drifted, without a machine of the class."""

import msgspec
import numpy as np
import pytest
from tests.conftest import FP32

from farflung.config import save
from farflung.ops import recalibrate as ops
from farflung.protocol import messages as m
from farflung.protocol import wire
from farflung.protocol.errors import ConfigError
from farflung.protocol.identity import seal
from farflung.trust.diagnose import UNSEEDED
from farflung.trust.evidence import Profile, Profiles, Seen, Tally, from_json, log_ratios, to_json

OLD = Profile("gpu", (0.05, 1.0), (0.2, 0.01, 0.0001), Tally((9, 9, 9), (0, 0, 0)), noise=1e-3, **FP32)
"""It forgives what noise of some thousandths does."""


def machine(rng: np.random.Generator, noise: float, tokens: int = 40, *, is_seeded: bool = True) -> Seen:
    """A rollout of a machine whose scores are off by so much, as a verifier sees it."""
    gap = rng.exponential(1.0, tokens)
    pick = rng.uniform(0.2, 0.9, tokens)
    is_flip = rng.normal(0, noise, tokens) > gap if is_seeded else rng.random(tokens) > pick
    return Seen(gap, np.where(is_flip, gap, 0.0), pick, np.where(rng.random(tokens) < 0.5, -1.0, 1.0))


def audits(seed: int, noise: float, count: int = 15, **options) -> ops.Audits:
    rng = np.random.default_rng(seed)
    return [[machine(rng, noise, **options) for _ in range(4)] for _ in range(count)]


def evidence_against(profile: Profile, found: ops.Audits) -> float:
    ratios = [ops.submission_log_ratios([log_ratios(profile, one) for one in audit]) for audit in found]
    return sum(map(ops.mean_log_ratio, ratios))


def test_what_is_made_of_a_class_that_drifted_forgives_others_of_it_and_no_cheat() -> None:
    drifted = [audits(seed, 0.1) for seed in range(4)]
    assert evidence_against(OLD, drifted[0]) > ops.UNLIKE, "by the old profile they are cheats"
    found = ops.made_of(OLD, "gpu-2", drifted, ("float32",))
    assert (found.name, found.fields, found.scope) == ("gpu-2", OLD.fields, OLD.scope)
    assert evidence_against(found, audits(9, 0.1)) < 0
    assert evidence_against(found, audits(10, 0.1, is_seeded=False)) > ops.UNLIKE
    assert found.power[UNSEEDED] > 0.01
    assert OLD.noise < ops.noise_of(OLD, drifted) < 1, "the self-test forgives them too"


def test_a_node_that_flips_as_the_others_do_not_is_left_out() -> None:
    of_nodes = {f"n{seed}": audits(seed, 0.1) for seed in range(4)} | {"cheat": audits(8, 0.1, is_seeded=False)}
    assert ops.alike(OLD, of_nodes).keys() == {"n0", "n1", "n2", "n3"}


@pytest.fixture
def drifted(make_house, tmp_path):
    """A run in whose audits the nodes under one profile drifted; gives its folder and those nodes."""
    house = make_house(trust={"audit_floor": 1.0, "audit_least": 1.0}, learn={"groups": 64}, run={"steps": 9})
    (tmp_path / "gpu.json").write_bytes(to_json(OLD))
    house.ctx.profiles = Profiles(house.ctx.profiles.run, (OLD,))
    model = house.config.model.model_copy(update={"profiles": (str(tmp_path / "gpu.json"),)})
    save(house.config.model_copy(update={"model": model}), house.config.folder / "config.json")
    rng = np.random.default_rng(3)

    def seen(job: m.AuditJob) -> list[m.RolloutEvidence]:
        return [
            m.RolloutEvidence(
                rollout=one.rollout,
                **{name: wire.pack_floats(x) for name, x in machine(rng, 0.1, len(one.ids) // 4)._asdict().items()},
            )
            for one in job.rollouts
        ]

    async def scenario(house) -> None:
        await house.step(0)
        for name in ("gpu-0", "gpu-1"):
            house.clients[name] = house.line(name)
            register = m.Register(version=m.VERSION, name=name, profile="gpu")
            await house.clients[name].post("/v1/nodes", register, m.Welcome)
        for _ in range(4):
            for name in ("gpu-0", "gpu-1"):
                if (lease := await house.ask(name)) is not None:
                    await house.submit(name, lease)
            for job in await house.claim_audits():
                evidence = msgspec.structs.replace(house.evidence(job, lambda _: False), rollouts=seen(job))
                signed = seal(house.named("val-1"), "evidence", evidence)
                await house.tell("val-1", f"audits/{job.audit}/evidence", signed, m.Done)

    house.run(scenario)
    return house.config.folder, {name: house.named(name).id for name in ("gpu-0", "gpu-1")}


def test_the_evidence_of_a_run_becomes_a_profile(drifted, tmp_path, monkeypatch) -> None:
    folder, nodes = drifted
    with pytest.raises(ConfigError, match=r"audited tokens of 2 nodes under profile 'gpu' are too few"):
        ops.recalibrate(folder, "gpu", tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()
    monkeypatch.setattr(ops, "LEAST_TOKENS", 50)
    made = ops.recalibrate(folder, "gpu", tmp_path / "new.json", new_name="gpu-2")
    assert from_json((tmp_path / "new.json").read_bytes()) == made
    assert made.honest.tokens >= 50
    assert made.noise >= OLD.noise
    assert made.verified_in == ("float32",)
    with pytest.raises(ConfigError, match="of 1 nodes under profile"):
        ops.recalibrate(folder, "gpu", tmp_path / "one.json", nodes=[nodes["gpu-0"]])


def test_what_it_cannot_be_made_of_is_refused(drifted, tmp_path) -> None:
    folder, _ = drifted
    with pytest.raises(ConfigError, match="admits no numerics profile 'tpu'; it has torch-cpu-fp32, gpu"):
        ops.recalibrate(folder, "tpu", tmp_path / "new.json")
    small = msgspec.structs.replace(OLD, quantiser="int8", bits=8)
    with pytest.raises(ConfigError, match="weights in int8"):
        ops._profile(Profiles(small), "gpu")
    noise = {f"n{seed}": audits(seed, 0.1, is_seeded=False) for seed in range(3)}
    blind = ops.made_of(OLD, "gpu", list(noise.values()), ("float32",))
    with pytest.raises(ConfigError, match="would not tell a node that ignores its seeds"):
        ops._refuse_blind(blind, noise)
