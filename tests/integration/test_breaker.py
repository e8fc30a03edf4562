"""Who can stop a run: verifiers that disagree, or that fail everybody; no number of keys that cheat together."""

import json
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import sqlalchemy as sa
from tests.conftest import PROFILE, VOCAB, tokens_of

from farflung.protocol import messages as m
from farflung.protocol import wire
from farflung.queries import views
from farflung.store.tables import AUDITS, NODES, ROLLOUTS, RUNS, VERDICTS
from farflung.trust.evidence import Profiles

GARBAGE = 3
"""What keys that have turned fill their rollouts with."""


def opened(house) -> str:
    return house.rows(sa.select(RUNS.c.breaker))[0][0]


async def trusted(house, names) -> None:
    for name in names:
        await house.make_trusted(name)


def is_seeds(ids: bytes, seed: int) -> bool:
    return wire.unpack_ids(ids).tolist() == tokens_of(seed)


async def replay(house, name: str = "val-1") -> None:
    """Answer every audit as a verifier that works does."""
    while jobs := await house.claim_audits(name):
        for job in jobs:
            bad = {one.rollout for one in job.rollouts if not is_seeds(one.ids, one.seed)}
            await house.testify(job, bad.__contains__, name)


def garbage(lease: m.Lease) -> m.Submission:
    ids = wire.pack_ids([GARBAGE] * lease.max_new_tokens)
    return m.Submission(
        rollouts=[m.SubmittedRollout(rollout=s.rollout, ids=ids) for g in lease.groups for s in g.samples]
    )


# --- cheats that fail together -----------------------------------------------------------------------------------


def test_three_keys_of_many_that_fail_together_stop_nobody_and_lose_all_they_sent(make_house) -> None:
    house = make_house(trust={"audit_floor": 1.0, "audit_least": 1.0}, learn={"groups": 64})

    async def scenario(house) -> None:
        await house.step(0)
        await trusted(house, [f"ada-{i}" for i in range(20)])
        cheats = [f"eve-{i}" for i in range(3)]
        await trusted(house, cheats)
        for name in cheats:
            lease = await house.lease(name)
            await house.submit(name, lease, garbage(lease))
        await replay(house)
        assert opened(house) == ""
        assert house.statuses(NODES, role="worker") == {"trusted": 20, "probation": 3}
        sent = sa.select(ROLLOUTS.c.status).where(ROLLOUTS.c.node.in_([house.named(name).id for name in cheats]))
        assert {row[0] for row in house.rows(sent.order_by(ROLLOUTS.c.rollout)) if row[0] != "received"} <= {
            "rejected", "void", "accepted",
        }  # fmt: skip
        void = sa.select(sa.func.count()).where(ROLLOUTS.c.status.in_(("rejected", "void")))
        assert house.rows(void)[0][0] == 12
        answer = await house.tell("trainer", "steps/1/claim", m.ClaimStep(), m.BatchAnswer)
        assert "suspect" not in answer.reason

    house.run(scenario)


class Replayer:
    """An engine that replays as `tokens_of` generates."""

    def replay(self, items):
        for request, ids in items:
            bad = tokens_of(request.seed) != list(ids)
            size = len(ids)
            yield SimpleNamespace(
                gap=np.full(size, 1.5),
                margin=np.full(size, float(bad)),
                pick=np.full(size, 0.5),
                lead=np.full(size, -1.0),
                logp=np.zeros(size, np.float32),
            )


async def suspects(house, batch: m.Batch, *, is_all: bool):
    """The rollouts of a batch as the trainer's tripwire gets them."""
    pytest.importorskip("torch")
    from farflung.rollouts import batch as batches

    session = SimpleNamespace(client=await house.client("trainer"), path=lambda path: f"{house.path}/{path}")
    return await batches.suspects(batches.Bodies(session), batch, is_all=is_all)


async def tripped(house, batch: m.Batch) -> list[str]:
    """Submissions of a batch that the trainer's own tripwire catches, by its own functions."""
    tripwire = pytest.importorskip("farflung.audits.tripwire")
    looked = tripwire.inspect(Replayer(), await suspects(house, batch, is_all=False), 1.0, 8, PROFILE)
    return tripwire.tripped((one.submission, one.log_ratios) for one in looked)


def test_a_swarm_of_thirty_keys_that_turn_at_once_stops_nothing_and_nothing_of_theirs_is_trained_on(make_house) -> None:
    """Five honest nodes beside them, audits of the trusted as rare as they come."""
    house = make_house(
        trust={"audit_floor": 0.01, "audit_scale": 0.0, "audit_least": 0.0},
        learn={"groups": 8, "oversample": 1.0},
        lease={"rollouts": 4, "lease_s": 100.0, "lost_s": 40.0, "heartbeat_s": 5.0, "ahead": 8.0},
        run={"steps": 9},
    )
    honest, swarm = [f"ada-{i}" for i in range(5)], [f"eve-{i}" for i in range(30)]

    async def turn(house, name: str) -> None:
        """Garbage for a lease, if there is one."""
        lease = await house.ask(name)
        if lease is not None:
            await house.submit(name, lease, garbage(lease))

    async def train(house, step: int) -> None:
        for _ in range(60):
            for name in swarm:
                if house.row(NODES, house.named(name).id).status != "ejected":
                    await turn(house, name)
            for name in honest:
                if lease := await house.ask(name):
                    await house.submit(name, lease)
            await replay(house)
            await house.score()
            while (batch := await house.claim_step(step)) is not None and (caught := await tripped(house, batch)):
                await house.tell("trainer", f"steps/{step}/trip", m.Trips(submissions=caught), m.Done)
                await replay(house)
            if batch is not None and batch.groups:
                every = await suspects(house, batch, is_all=True)
                assert all(list(one.ids) == tokens_of(one.seed) for one in every), "text that no seed gave"
                return await house.commit(batch)
            house.clock.now += 5
        raise AssertionError(f"step {step} never came; breaker: {opened(house)!r}")

    async def scenario(house) -> None:
        await house.step(0)
        await trusted(house, [*honest, *swarm])
        for step in (1, 2, 3, 4):
            await train(house, step)
            assert opened(house) == ""
        trained = house.rows(sa.select(ROLLOUTS).where(ROLLOUTS.c.status == "trained"))
        turned = {house.named(name).id for name in swarm}
        assert trained
        for row in (row for row in trained if row.node in turned):
            assert row.is_audited, "honest work of the time before"
        found_out = len(honest) + len(swarm) - house.statuses(NODES, role="worker")["trusted"]
        assert found_out > len(swarm) // 2, "the others sent little yet, or it waits in groups that nobody trains on"
        assert all(house.row(NODES, house.named(name).id).status == "trusted" for name in honest)

    house.run(scenario)


# --- verifiers that are broken -----------------------------------------------------------------------------------


@pytest.fixture
def watched(make_house):
    """All that trusted nodes send is audited."""
    return make_house(trust={"audit_floor": 1.0, "audit_least": 1.0}, learn={"groups": 64}, run={"steps": 9})


async def condemn(house, names, times: int = 3) -> None:
    """Work of these nodes, condemned by val-1; val-2 is there and says nothing yet."""
    await house.client("val-2")
    for _ in range(times):
        for name in names:
            await house.work(name)
        await house.audit(lambda rollout: True, "val-1")


def test_verifiers_that_disagree_halt_verdicts_and_training(watched) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        crowd = [f"ada-{i}" for i in range(8)]
        await trusted(house, crowd)
        await condemn(house, crowd[:2])
        assert house.statuses(NODES, role="worker") == {"trusted": 6, "quarantined": 2}
        assert opened(house) == ""
        await replay(house, "val-2")
        assert "verifiers disagree about 2 nodes at step 0" in opened(house)
        assert house.statuses(NODES, role="worker")["ejected"] == 0
        answer = await house.tell("trainer", "steps/1/claim", m.ClaimStep(), m.BatchAnswer)
        assert answer.batch is None

    watched.run(scenario)


def test_a_second_opinion_that_clears_one_node_stops_nothing(watched) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await trusted(house, [f"ada-{i}" for i in range(8)])
        await condemn(house, ["ada-0"])
        await replay(house, "val-2")
        assert house.rows(sa.select(VERDICTS.c.outcome).order_by(VERDICTS.c.id.desc()))[0][0] == "release"
        assert opened(house) == ""

    watched.run(scenario)


def test_while_good_nodes_fail_and_none_passes_nobody_is_ejected(watched) -> None:
    """A lone validator breaks: it confirms its own verdicts."""

    async def scenario(house) -> None:
        await house.step(0)
        crowd = [f"ada-{i}" for i in range(8)]
        await trusted(house, crowd)
        for _ in range(3):
            for name in crowd[:4]:
                await house.work(name)
        await house.audit(lambda rollout: True)
        assert house.statuses(NODES, role="worker") == {"trusted": 4, "quarantined": 4}
        assert house.statuses(AUDITS, kind="confirm") == {"open": 4}, "it waits for others"
        for name in crowd[4:]:
            await house.work(name)
        await house.audit(lambda rollout: True)
        assert "8 nodes that did 100% of the work" in opened(house)

    watched.run(scenario)


def test_once_others_pass_cheats_are_ejected(watched) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        crowd = [f"ada-{i}" for i in range(8)]
        await trusted(house, crowd)
        for _ in range(3):
            for name in crowd[:4]:
                lease = await house.lease(name)
                await house.submit(name, lease, garbage(lease))
        await replay(house)
        assert house.statuses(NODES, role="worker")["quarantined"] == 4
        await house.work(crowd[4])
        await replay(house)
        assert house.statuses(NODES, role="worker") == {"trusted": 4, "ejected": 4}
        assert opened(house) == ""

    watched.run(scenario)


def test_work_counts_by_what_passed(watched) -> None:
    """Audits of garbage add nothing to what a swarm weighs."""
    from farflung.audits import breaker as rollouts_brake

    async def scenario(house) -> None:
        await house.step(0)
        await trusted(house, ["ada", "eve"])
        ids = [house.named(name).id for name in ("ada", "eve")]
        before = await house.ctx.database.read(lambda c: rollouts_brake._work(c, ids))
        lease = await house.lease("eve")
        await house.submit("eve", lease, garbage(lease))
        await replay(house)
        assert await house.ctx.database.read(lambda c: rollouts_brake._work(c, ids)) == before
        assert before[ids[0]] > VOCAB // 4

    watched.run(scenario)


# --- machines of one kind whose arithmetic has changed -----------------------------------------------------------


@pytest.fixture
def mixed(watched):
    """The same run, that admits another profile too."""
    own = watched.ctx.profiles.run
    watched.ctx.profiles = Profiles(own, (msgspec.structs.replace(own, name="gpu"),))
    return watched


async def trusted_under(house, profile: str, names) -> None:
    for name in names:
        house.clients[name] = house.line(name)
        await house.clients[name].post(
            "/v1/nodes", m.Register(version=m.VERSION, name=name, profile=profile), m.Welcome
        )
    await trusted(house, names)


def suspects_of(house) -> dict[str, str]:
    return json.loads(house.rows(sa.select(RUNS.c.breaker_profiles))[0][0])


async def drift(house, gpus) -> None:
    """All machines under one profile make text that no verifier gives, whatever they do."""
    for name in gpus:
        lease = await house.lease(name)
        await house.submit(name, lease, garbage(lease))
    await replay(house)


def test_a_profile_whose_machines_all_fail_is_suspect_and_nobody_of_it_is_ejected(mixed) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        cpus, gpus = [f"ada-{i}" for i in range(8)], [f"gpu-{i}" for i in range(4)]
        await trusted(house, cpus)
        await trusted_under(house, "gpu", gpus)
        waiting = await house.lease(gpus[3])
        for _ in range(3):
            await drift(house, gpus[:3])
            for name in cpus:
                await house.work(name)
            await replay(house)
        assert suspects_of(house) == {}, "one of them is there and was not looked at yet"
        assert house.statuses(AUDITS, kind="confirm")["open"] == 3, "others of its kind are to pass first"
        await house.submit(gpus[3], waiting, garbage(waiting))
        await replay(house)
        assert "4 nodes that did 100% of the work" in suspects_of(house)["gpu"]
        assert opened(house) == "", "the others go on"
        assert await house.ask(gpus[3]) is None
        assert await house.ask(cpus[0]) is not None
        assert house.statuses(NODES, role="worker")["ejected"] == 0
        said = await house.ctx.database.read(lambda c: views.status(c, house.ctx.run_ctx, house.clock()))
        assert "gpu" in said.breaker_profiles

        await house.client("val-2")
        operator = house.line("coordinator")
        assert (await operator.post(f"{house.admin_path}/breaker/close", m.Empty(), m.Done)).changed == 1
        await operator.close()
        assert suspects_of(house) == {}
        await replay(house, "val-2")
        assert house.statuses(NODES, role="worker")["ejected"] == 3

    mixed.run(scenario)


def test_cheats_of_one_kind_are_ejected_once_one_of_it_passes(mixed) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        gpus = [f"gpu-{i}" for i in range(4)]
        await trusted(house, [f"ada-{i}" for i in range(8)])
        await trusted_under(house, "gpu", gpus)
        for _ in range(3):
            await drift(house, gpus[:3])
        assert house.statuses(NODES, role="worker")["quarantined"] == 3
        await house.work(gpus[3])
        await replay(house)
        assert house.statuses(NODES, role="worker")["ejected"] == 3
        assert suspects_of(house) == {}

    mixed.run(scenario)
