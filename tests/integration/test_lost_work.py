"""What a fault of a worker cost, as `farflung chaos` reads it from the database."""

from farflung.ops.chaos import _settle_lease
from farflung.ops.faults import Fault


def test_what_others_had_to_make_again_is_what_was_lost(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        lost = await house.lease("ada")
        fault = Fault("kill", "worker", 0.0, victim="ada", at=house.clock(), lease=lost.lease)
        house.clock.now += house.config.lease.lost_s + 1
        await house.client("bob")
        await house.coordinator.database.write(house.coordinator._sweep_once)
        before = await house.coordinator.database.read(lambda c: (_settle_lease(c, fault), fault.lost_tokens)[1])
        assert before == 0, "nobody made anything of it again"
        samples = {sample.seed for group in lost.groups for sample in group.samples}
        made = 0
        while samples:
            lease = (await house.work("bob"))[0]
            sent = {rollout.rollout: len(rollout.ids) // 4 for rollout in house.honest(lease).rollouts}
            for sample in (one for group in lease.groups for one in group.samples if one.seed in samples):
                samples.discard(sample.seed)
                made += sent[sample.rollout]
        await house.coordinator.database.read(lambda c: _settle_lease(c, fault))
        assert fault.lost_tokens == made > 0
        assert fault.detected_s > house.config.lease.lost_s

    house.run(scenario)
