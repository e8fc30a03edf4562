"""The coordinator from the first lease to the last step; requests are as real nodes send them, tokens are made up."""

import pytest
import sqlalchemy as sa

from farflung.protocol import messages as m
from farflung.protocol.errors import Conflict, Ejected, LeaseGone, Malformed, StepTaken
from farflung.protocol.identity import Signed, seal
from farflung.store import ledger
from farflung.store.tables import AUDITS, EVENTS, GROUPS, LEASES, NODES, ROLLOUTS, RUNS, STEPS, VERDICTS


def never(rollout):
    return False


def always(rollout):
    return True


def test_from_lease_to_step_and_every_request_twice(house) -> None:
    async def scenario(house) -> None:
        batch = await house.claim_step(0)
        assert await house.claim_step(0) == batch
        assert (await house.commit(batch), await house.commit(batch)) == (1, 0)
        for _ in range(2):
            lease = await house.lease("ada")
            assert await house.lease("ada") == lease
            receipt = await house.submit("ada", lease)
            assert await house.submit("ada", lease) == receipt
            assert (receipt.rollouts, receipt.node) == (4, house.named("ada").id)
        assert house.statuses(ROLLOUTS) == {"held": 8}
        for job in await house.claim_audits():
            assert (await house.testify(job, never), await house.testify(job, never)) == (1, 0)
        assert house.statuses(ROLLOUTS) == {"received": 8}
        assert (await house.score(), await house.score()) == (8, 0)
        assert house.statuses(GROUPS) == {"complete": 2}
        batch = await house.claim_step(1)
        assert await house.claim_step(1) == batch
        assert [len(group.rollouts) for group in batch.groups] == [4, 4]
        assert (batch.seen_groups, batch.seen_reward) == (2, 0.5)
        assert (await house.commit(batch), await house.commit(batch)) == (1, 0)
        assert house.statuses(ROLLOUTS) == {"trained": 8}
        assert house.balance(ledger.escrow(house.named("ada").id)) == sum(
            r.tokens for r in house.rows(sa.select(ROLLOUTS))
        )

    house.run(scenario)


def test_a_whole_run_ends_and_pays(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        for step in (1, 2, 3):
            await house.work("ada", 2)
            await house.audit()
            await house.score()
            await house.step(step)
        assert house.row(RUNS, "test").status == "finishing"
        assert await house.ask("ada") is None
        while (lease := await house.ask("val-1")) is not None:
            assert (lease.purpose, lease.temperature) == ("eval", 0.0)
            await house.submit("val-1", lease)
        await house.score()
        await house.swept()
        assert house.row(RUNS, "test").status == "finished"
        ada = house.named("ada").id
        assert house.balance(ledger.escrow(ada)) == 0
        assert house.balance(ledger.credit(ada)) == sum(
            r.tokens for r in house.rows(sa.select(ROLLOUTS)) if r.node == ada
        )
        assert house.balance(ledger.credit(house.named("val-1").id)) == 0

    house.run(scenario)


def test_a_run_does_not_end_and_pay_while_an_audit_waits(make_house) -> None:
    house = make_house(run={"steps": 1}, eval={"tasks": 0})

    async def scenario(house) -> None:
        await house.step(0)
        await house.work("ada", 2)
        await house.audit()
        await house.score()
        await house.work("eve")
        await house.step(1)
        await house.swept()
        assert house.row(RUNS, "test").status == "finishing"
        await house.audit()
        await house.swept()
        assert house.row(RUNS, "test").status == "finished"

    house.run(scenario)


def test_an_expired_lease_goes_to_another_with_the_same_seeds(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        lease = await house.lease("ada")
        await house.client("bob")
        await house.swept(after_s=50)
        assert house.story(lease.lease) == ["open", "expired"]
        again = await house.lease("bob")
        before, after = ([(s.index, s.seed) for s in held.groups[0].samples] for held in (lease, again))
        assert (again.groups[0].group, after) == (lease.groups[0].group, before)
        assert [row.is_reissue for row in house.rows(sa.select(ROLLOUTS.c.is_reissue, ROLLOUTS.c.lease))] == [0] * 4 + [
            1
        ] * 4
        with pytest.raises(LeaseGone, match=r"is expired, it was opened 50 s ago"):
            await house.submit("ada", lease)
        await house.submit("bob", again)

    house.run(scenario)


def test_a_heartbeat_keeps_a_lease_until_its_deadline_and_tells_of_its_loss(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        lease = await house.lease("ada")
        for _ in range(3):
            await house.swept(after_s=30)
            assert (await house.tell("ada", "heartbeat", m.Heartbeat(), m.HeartbeatReply)).lost_leases == []
        assert house.row(LEASES, lease.lease).status == "open"
        await house.swept(after_s=30)
        assert (await house.tell("ada", "heartbeat", m.Heartbeat(), m.HeartbeatReply)).lost_leases == [lease.lease]

    house.run(scenario)


def test_a_node_that_drains_hands_in_what_it_has(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        lease = await house.lease("ada")
        receipt = await house.submit("ada", lease, house.honest(lease, keep=3))
        assert receipt.rollouts == 3
        assert house.statuses(ROLLOUTS) == {"held": 3, "expired": 1}
        again = await house.lease("bob")
        assert len(again.groups) == 2, "the one sample that is open again, and three of another group"
        assert [s.index for s in again.groups[0].samples] == [3]
        assert again.groups[0].group == lease.groups[0].group

    house.run(scenario)


def test_groups_without_variance_are_paid_and_dropped(make_house) -> None:
    house = make_house(learn={"groups": 2, "oversample": 2.0})

    async def scenario(house) -> None:
        await house.step(0)
        await house.work("ada", 4)
        await house.audit()
        await house.score(lambda rollout: 1.0)
        batch = await house.step(1)
        assert (batch.groups, batch.seen_groups, batch.seen_reward) == ([], 4, 1.0)
        assert house.statuses(ROLLOUTS) == {"dropped": 16}
        assert house.balance(ledger.escrow(house.named("ada").id)) > 0

    house.run(scenario)


def test_stale_groups_are_dropped_wherever_their_rollouts_are(make_house) -> None:
    house = make_house(run={"steps": 9})

    async def hands(house) -> None:
        """Somebody's honest work, with the audits of all others left open."""
        await house.work("hands")
        for job in await house.claim_audits():
            if house.row(AUDITS, job.audit).node == house.named("hands").id:
                await house.testify(job, never)
        await house.score()

    async def scenario(house) -> None:
        await house.step(0)
        (held,) = await house.work("ada")
        leased = await house.lease("bob")
        for step in (1, 2, 3):
            while await house.claim_step(step) is None:
                await hands(house)
            await house.step(step)
        assert house.statuses(ROLLOUTS, group=held.groups[0].group) == {"dropped": 4}
        assert house.statuses(ROLLOUTS, group=leased.groups[0].group) == {"expired": 4}
        receipt = await house.submit("bob", leased)
        assert (receipt.rollouts, receipt.tokens) == (0, 0)
        await house.audit()
        assert set(house.statuses(AUDITS)) == {"done"}, "evidence counts for stale work too"

    house.run(scenario)


def test_a_voided_submission_reopens_what_was_complete(make_house) -> None:
    house = make_house(run={"steps": 99}, trust={"probation_rollouts": 4, "audit_scale": 0.0, "audit_floor": 0.3})

    async def scenario(house) -> None:
        await house.step(0)
        await house.make_trusted("eve")
        eve = house.named("eve").id
        lease = await _drawn_in_part(house, "eve")
        await house.score()
        drawn = await house.claim_audits()
        await house.score()
        before = house.balance(ledger.escrow(eve))
        for job in drawn:
            await house.testify(job, always)
        paid = [
            row
            for row in house.rows(sa.select(ROLLOUTS).where(ROLLOUTS.c.lease == lease.lease))
            if row.reward is not None
        ]
        assert paid, "some of it was accepted before the verdict"
        assert before - house.balance(ledger.escrow(eve)) == sum(row.tokens for row in paid)
        assert house.statuses(ROLLOUTS, lease=lease.lease) == {"rejected": 1, "void": 3}
        assert house.row(GROUPS, lease.groups[0].group).status == "open"
        assert house.row(NODES, eve).status == "probation"
        assert house.rows(sa.select(VERDICTS.c.outcome)) == [("void",)]
        again = await house.lease("bob")
        assert again.groups[0].group == lease.groups[0].group

    house.run(scenario)


async def _drawn_in_part(house, name) -> m.Lease:
    """Submissions until one rollout of one was drawn for audit and three were not."""
    for _ in range(40):
        lease = await house.lease(name)
        await house.submit(name, lease)
        if house.statuses(ROLLOUTS, lease=lease.lease)["held"] == 1:
            return lease
        await house.audit()
        await house.score()
        await _train_what_is_ready(house)
    raise AssertionError("nothing was drawn")


async def _train_what_is_ready(house) -> None:
    latest = await house.ctx.database.read(house.ctx.run_ctx.latest)
    if await house.claim_step(latest.step + 1) is not None:
        await house.step(latest.step + 1)


def test_an_ejection_voids_burns_and_leases_again(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        eve = house.named("eve").id
        leases = await house.work("eve", 3)
        open_lease = await house.lease("eve")
        await house.audit(always)
        assert house.row(NODES, eve).status == "ejected"
        outcomes = [row[0] for row in house.rows(sa.select(VERDICTS.c.outcome))]
        assert outcomes == ["void", "void", "quarantine", "eject"]
        assert house.row(LEASES, open_lease.lease).status == "void"
        assert house.balance(ledger.escrow(eve)) == 0
        for lease in leases:
            assert house.statuses(ROLLOUTS, lease=lease.lease) == {"rejected": 4}
        with pytest.raises(Ejected, match="was ejected"):
            await house.lease("eve")
        with pytest.raises(LeaseGone):
            await house.submit("eve", open_lease)
        again = [(await house.lease(name)).groups[0].group for name in ("bob", "col", "dan", "fay")]
        assert set(again) == {lease.groups[0].group for lease in (*leases, open_lease)}

    house.run(scenario)


def test_audits_left_open_by_an_ejection_are_cancelled_and_late_evidence_changes_nothing(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await house.work("eve", 4)
        jobs = await house.claim_audits()
        for job in jobs[:3]:
            assert await house.testify(job, always) == 1
        (second_opinion,) = await house.claim_audits("val-2")
        assert await house.testify(second_opinion, always, "val-2") == 1
        assert house.statuses(AUDITS) == {"done": 4, "cancelled": 1}
        assert await house.testify(jobs[3], never) == 0
        assert await house.claim_audits() == []
        await house.work("ada", 2)
        assert await house.audit() == 2, "the others' audits go on"

    house.run(scenario)


def test_a_routine_audit_waits_for_company_while_any_may_come(make_house) -> None:
    house = make_house(trust={"probation_rollouts": 4, "audit_scale": 0.0, "audit_floor": 1.0})

    async def claimed(house, linger_s: float) -> int:
        ask = m.Claim(limit=64, linger_s=linger_s)
        return len((await house.tell("val-1", "audits/claim", ask, m.AuditJobs)).jobs)

    async def scenario(house) -> None:
        await house.step(0)
        await house.make_trusted("ada")
        lease = await house.lease("bob")
        await house.work("ada")
        assert await claimed(house, 4.0) == 0, "bob's may come too"
        house.clock.now += 5
        assert await claimed(house, 4.0) == 1, "it has waited"
        await house.audit()
        await house.work("ada")
        assert await claimed(house, 4.0) == 0
        await house.give_back("bob", lease)
        assert await claimed(house, 4.0) == 1, "nobody generates, so none will come"

    house.run(scenario)


def test_evidence_out_of_order_waits_for_the_earlier_submission(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await house.work("ada")
        house.clock.now += 1
        await house.work("ada")
        early, late = await house.claim_audits()
        await house.testify(late, never)
        assert house.statuses(ROLLOUTS) == {"held": 8}
        await house.testify(early, never)
        assert house.statuses(ROLLOUTS) == {"received": 8}
        assert house.row(NODES, house.named("ada").id).status == "trusted"

    house.run(scenario)


def test_a_claim_that_lapsed_goes_to_another_validator_and_counts_once(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await house.work("ada")
        (job,) = await house.claim_audits("val-1")
        assert await house.claim_audits("val-2") == []
        house.clock.now += 31
        (again,) = await house.claim_audits("val-2")
        assert again == job
        assert await house.testify(job, always, "val-1") == 0
        assert await house.testify(again, never, "val-2") == 1
        assert house.story(job.audit) == ["open", "claimed", "open", "claimed", "done"]

    house.run(scenario)


def test_a_slow_validator_that_is_alive_keeps_its_claim(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await house.work("ada")
        (job,) = await house.claim_audits("val-1")
        for _ in range(3):
            house.clock.now += 20
            await house.tell("val-1", "heartbeat", m.Heartbeat(), m.HeartbeatReply)
            assert await house.claim_audits("val-2") == []
        assert await house.testify(job, never, "val-1") == 1

    house.run(scenario)


def test_a_claim_whose_answer_was_lost_is_given_again(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await house.work("ada")
        assert await house.claim_audits("val-1") == await house.claim_audits("val-1")
        await house.audit()
        claim = m.Claim(limit=64)
        first = await house.tell("scorer", "scores/claim", claim, m.ScoreJobs)
        again = await house.tell("scorer", "scores/claim", claim, m.ScoreJobs)
        assert [job.rollout for job in first.jobs] == [job.rollout for job in again.jobs] != []

    house.run(scenario)


def test_a_scorer_that_always_fails_gives_up_the_group_and_nothing_else(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        first, second = await house.work("ada", 2)
        await house.audit()
        lost = {sample.rollout for sample in first.groups[0].samples}
        for _ in range(house.config.scorer.faults):
            jobs = (await house.tell("scorer", "scores/claim", m.Claim(limit=64), m.ScoreJobs)).jobs
            results = [
                m.ScoreResult(rollout=job.rollout, error="no" if job.rollout in lost else "", reward=0.5)
                for job in jobs
            ]
            await house.tell("scorer", "scores", m.Scores(results=results), m.Done)
        assert house.row(GROUPS, first.groups[0].group).status == "dropped"
        assert house.statuses(ROLLOUTS, lease=first.lease) == {"dropped": 4}
        assert house.row(GROUPS, second.groups[0].group).status == "complete"
        assert (await house.lease("bob")).groups[0].group not in {first.groups[0].group, second.groups[0].group}

    house.run(scenario)


def test_a_task_that_cannot_be_scored_does_not_keep_the_run_from_ending(make_house) -> None:
    house = make_house(run={"steps": 1}, eval={"tasks": 1})

    async def scenario(house) -> None:
        await house.step(0)
        await house.work("ada", 2)
        await house.audit()
        await house.score()
        await house.step(1)
        while (lease := await house.ask("val-1")) is not None:
            await house.submit("val-1", lease)
        for _ in range(house.config.scorer.faults):
            jobs = (await house.tell("scorer", "scores/claim", m.Claim(), m.ScoreJobs)).jobs
            results = [m.ScoreResult(rollout=job.rollout, error="it divides by zero") for job in jobs]
            await house.tell("scorer", "scores", m.Scores(results=results), m.Done)
        await house.swept()
        assert house.row(RUNS, "test").status == "finished"

    house.run(scenario)


def test_steps_come_in_turn_and_once(house) -> None:
    async def scenario(house) -> None:
        with pytest.raises(Conflict, match="claim 0"):
            await house.claim_step(1)
        base = await house.step(0)
        with pytest.raises(StepTaken, match="is committed with weights"):
            await house.commit(base, weights=b"other weights")
        assert await house.commit(base, made_at=1.0) == 0, "the same weights, published again after a crash"
        await house.work("ada", 2)
        await house.audit()
        await house.score()
        batch = await house.claim_step(1)
        with pytest.raises(Conflict):
            await house.claim_step(2)
        with pytest.raises(Conflict, match="follows manifest"):
            await house.commit(batch, parent="0" * 64)
        with pytest.raises(Conflict, match="another secret"):
            await house.commit(batch, secret_commitment="0" * 64)
        with pytest.raises(Malformed, match="do not come to its own digest"):
            await house.commit(batch, digest="0" * 64)
        await house.commit(batch)
        assert (await house.claim_step(1)).committed == house.row(STEPS, "test-step-1").weights_digest
        assert (await house.claim_step(1)).groups == batch.groups

    house.run(scenario)


def test_a_verdict_after_the_batch_was_claimed_leaves_the_batch_as_it_is(make_house) -> None:
    house = make_house(trust={"probation_rollouts": 100})

    async def scenario(house) -> None:
        await house.step(0)
        await house.work("eve", 2)
        await house.audit()
        await house.score()
        batch = await house.claim_step(1)
        await house.work("eve", 3)
        await house.audit(always)
        assert house.row(NODES, house.named("eve").id).status == "ejected"
        assert await house.claim_step(1) == batch
        await house.commit(batch)
        assert house.statuses(ROLLOUTS)["trained"] == 8
        assert house.balance(ledger.escrow(house.named("eve").id)) == 0
        assert house.balance(ledger.BURNED) > 0

    house.run(scenario)


def test_a_verdict_on_matured_work_burns_no_more_than_there_is(make_house) -> None:
    trust = {"probation_rollouts": 4, "audit_scale": 0.0, "audit_floor": 0.3}
    house = make_house(run={"steps": 99}, coordinator={"mature_steps": 0}, trust=trust)

    async def scenario(house) -> None:
        await house.step(0)
        await house.make_trusted("eve")
        lease = await _drawn_in_part(house, "eve")
        await house.score()
        await house.audit(lambda rollout: rollout in {s.rollout for g in lease.groups for s in g.samples})
        assert house.statuses(ROLLOUTS, lease=lease.lease)["rejected"] == 1

    house.run(scenario)


def test_a_restart_in_the_middle_changes_nothing(house) -> None:
    leases = {}

    async def before(house) -> None:
        await house.step(0)
        leases["ada"] = await house.lease("ada")
        leases["bob"] = await house.lease("bob")
        await house.submit("bob", leases["bob"])
        await house.claim_audits()

    async def after(house) -> None:
        assert await house.lease("ada") == leases["ada"]
        await house.submit("ada", leases["ada"])
        await house.submit("bob", leases["bob"])
        assert await house.audit() == 2
        await house.score()
        assert await house.step(1)

    house.run(before)
    house.close()
    import asyncio

    again = asyncio.run(type(house).open(house.config, house.clock))
    again.run(after)
    again.close()


@pytest.mark.parametrize("status", ["finishing", "finished"])
def test_a_run_that_ended_goes_on_when_it_is_given_more_steps(make_house, status) -> None:
    import asyncio

    house = make_house(run={"steps": 1}, eval={"tasks": 0 if status == "finished" else 1})

    async def before(house) -> None:
        await house.step(0)
        await house.work("ada", 2)
        await house.audit()
        await house.score()
        await house.step(1)
        await house.swept()
        assert house.row(RUNS, "test").status == status

    async def after(house) -> None:
        assert house.row(RUNS, "test").status == "running"
        await house.work("ada", 2)
        await house.audit()
        await house.score()
        await house.step(2)

    house.run(before)
    more = house.config.model_copy(update={"run": house.config.run.model_copy(update={"steps": 3})})
    again = asyncio.run(type(house).open(more, house.clock))
    again.run(after)
    again.close()


def test_a_node_that_refuses_every_lease_is_leased_less_and_less(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        granted = 0
        for _ in range(200):
            lease = await house.ask("ada")
            if lease is not None:
                granted += 1
                await house.give_back("ada", lease)
            house.clock.now += 0.5
        assert 5 <= granted <= 8, "1, 2, 4, … seconds apart"
        house.clock.now += 100
        assert await house.ask("ada") is not None

    house.run(scenario)


def test_groups_that_nobody_can_complete_do_not_end_all_leasing(make_house) -> None:
    """Four groups may be in progress; four of step 0 lose their nodes when step 2 is the latest."""
    trust = {"probation_rollouts": 99, "probation_waiting": 99}  # nobody is trusted, for whom half would be kept
    house = make_house(run={"steps": 9}, lease={"ahead": 2.0}, trust=trust)

    async def scenario(house) -> None:
        await house.step(0)
        held = [await house.lease(name) for name in ("n2", "n3")]
        for step, (names, lost) in enumerate([(("n0", "n1"), ()), (("n4", "n5"), ("n6", "n7"))], 1):
            for name in names:
                await house.work(name)
            await house.audit()
            await house.score()
            batch = await house.claim_step(step)
            held += [await house.lease(name, loaded_step=0) for name in lost]
            await house.commit(batch)
        assert [lease.step for lease in held] == [0, 0, 0, 0]
        await house.swept(after_s=101)
        assert house.statuses(GROUPS) == {"open": 4, "trained": 4}
        assert (await house.lease("ada")).step == 2

    house.run(scenario)


def test_every_change_of_a_rollout_is_told(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        (lease,) = await house.work("ada")
        await house.audit()
        await house.score()
        rollout = lease.groups[0].samples[0].rollout
        story = await house.line("anyone").get(f"/v1/story/{rollout}", m.Story)
        assert [event.after for event in story.events] == ["leased", "held", "received", "accepted"]
        assert house.rows(sa.select(sa.func.count()).select_from(EVENTS))[0][0] > 4

    house.run(scenario)


def test_two_validators_may_each_seal_but_not_for_one_another(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await house.work("ada")
        (job,) = await house.claim_audits("val-1")
        signed = seal(house.named("val-1"), "evidence", house.evidence(job, always))
        from farflung.protocol.errors import Forbidden

        with pytest.raises(Forbidden, match="sealed by the key that sends it"):
            await house.tell("val-2", f"audits/{job.audit}/evidence", signed, m.Done)
        assert isinstance(signed, Signed)
        assert await house.testify(job, never, "val-2") == 0, "it was not the one who claimed it"

    house.run(scenario)
