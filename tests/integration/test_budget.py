"""The audit budget: what a replayed and a generated token cost, by the word of validators and of nobody else."""

import pytest

from farflung.audits import budget
from farflung.protocol import messages as m

BY_CPU = {"recent_cpu_s": 2.0, "recent_tokens": 1000, "made_cpu_s": 10.0, "made_tokens": 1000}
"""A replayed token costs a fifth of a generated one."""


async def afford(house, **beats: dict) -> float:
    """The audit probability that is affordable after these heartbeats, by name."""
    for name, figures in beats.items():
        await house.tell(name, "heartbeat", m.Heartbeat(**figures), m.HeartbeatReply)
    return await house.ctx.database.read(lambda c: budget.afford(c, house.ctx.run_ctx))


def named(**figures: dict) -> dict:
    return {name.replace("_", "-"): values for name, values in figures.items()}


def test_a_budget_is_a_share_of_what_generation_costs(house) -> None:
    async def scenario(house) -> None:
        assert await afford(house) == 1.0, "nothing is measured yet"
        share = await afford(house, **named(val_1=BY_CPU))
        assert share == pytest.approx(house.ctx.config.trust.audit_budget * 5)

    house.run(scenario)


def test_seconds_of_an_accelerator_take_the_place_of_the_processors(house) -> None:
    """A thread that waits for its card uses next to no CPU-seconds: by those an audit would cost nothing, or all."""

    async def scenario(house) -> None:
        card = BY_CPU | {"recent_cpu_s": 9.0, "made_cpu_s": 0.1, "recent_device_s": 0.2, "made_device_s": 1.0}
        assert await afford(house, **named(val_1=card)) == pytest.approx(house.ctx.config.trust.audit_budget * 5)
        mixed = await afford(house, **named(val_2=BY_CPU))
        assert mixed == pytest.approx(house.ctx.config.trust.audit_budget * 5), "in seconds of a core, both of them"

    house.run(scenario)


def test_no_number_of_a_worker_is_in_it(house) -> None:
    async def scenario(house) -> None:
        share = await afford(house, **named(val_1=BY_CPU))
        lies = {field: 1e12 for field in m.Heartbeat.__struct_fields__ if field.endswith(("cpu_s", "device_s"))}
        for made in (lies, dict.fromkeys(lies, 1e-9)):
            liar = made | {"recent_tokens": 10**9, "made_tokens": 10**9}
            assert await afford(house, eve=liar) == share

    house.run(scenario)
