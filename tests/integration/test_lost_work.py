"""What a fault of a worker cost, as `farflung chaos` reads it from the database."""

import pytest

from farflung.adversity.faults import Fault
from farflung.adversity.recovery import settle


def test_what_others_had_to_make_again_is_what_was_lost(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        lost = await house.lease("ada")
        fault = Fault("kill", "worker", 0.0, victim="ada", at=house.clock(), lease=lost.lease)
        house.clock.now += house.config.lease.lost_s + 1
        await house.client("bob")
        await house.ctx.database.write(house.coordinator.sweeper.sweep_once)
        before = await house.ctx.database.read(lambda c: (settle(c, fault, []), fault.lost_tokens)[1])
        assert before == 0, "nobody made anything of it again"
        samples = {sample.seed for group in lost.groups for sample in group.samples}
        made = 0
        while samples:
            lease = (await house.work("bob"))[0]
            sent = {rollout.rollout: len(rollout.ids) // 4 for rollout in house.honest(lease).rollouts}
            for sample in (one for group in lease.groups for one in group.samples if one.seed in samples):
                samples.discard(sample.seed)
                made += sent[sample.rollout]
        await house.ctx.database.read(lambda c: settle(c, fault, []))
        assert fault.lost_tokens == made > 0
        assert fault.detected_s > house.config.lease.lost_s

    house.run(scenario)


def test_what_a_validator_had_claimed_is_in_other_hands_when_it_is_claimed_again(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await house.work("ada")
        jobs = await house.claim_audits("val-1")
        assert jobs, "a node on probation is audited"
        fault = Fault("kill", "validator", 0.0, victim="val-1", at=house.clock())
        ended = [{"name": "val-1", "at": house.clock() + 0.5}]
        house.clock.now += house.config.coordinator.claim_s + 1
        await house.ctx.database.read(lambda c: settle(c, fault, ended))
        assert (fault.detected_s, fault.recovered_s) == (0.5, None), "nobody has taken it over"
        assert await house.claim_audits("val-2")
        await house.ctx.database.read(lambda c: settle(c, fault, ended))
        assert fault.recovered_s == pytest.approx(house.config.coordinator.claim_s + 0.5)
        idle = Fault("kill", "validator", 0.0, victim="val-1", at=house.clock())
        await house.ctx.database.read(lambda c: settle(c, idle, ended))
        assert (idle.detected_s, idle.recovered_s) == (0.0, 0.0), "it held nothing"

    house.run(scenario)


def test_a_coordinator_that_could_not_listen_takes_no_silence_for_a_death(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        lease = await house.lease("ada")
        lost_s = house.config.lease.lost_s
        sweeper = house.coordinator.sweeper
        sweeper.swept_at = house.clock()  # a sweep went through, then it was frozen or its database away
        await house.swept(after_s=lost_s + 1)
        assert house.story(lease.lease) == ["open"]
        house.ctx.database.failures += 1  # as on a disk that is full: a sweep that writes nothing goes through
        sweeper.swept_at = house.clock() + lost_s
        await house.swept(after_s=lost_s)
        assert house.story(lease.lease) == ["open"]
        sweeper.swept_at = house.clock() + lost_s  # sweeps go on, and the node is heard no more
        await house.swept(after_s=lost_s + 0.5)
        assert house.story(lease.lease) == ["open", "expired"]

    house.run(scenario)
