"""Pay follows work that was looked at, or could have been until it was final: garbage that no step takes earns none."""

import pytest
import sqlalchemy as sa

from farflung.protocol import messages as m
from farflung.protocol import wire
from farflung.store import ledger, payment
from farflung.store.tables import AUDITS, ENTRIES, GROUPS, LEASES, NODES, ROLLOUTS, VERDICTS
from farflung.tasks import lease as leasing

UNSEEN = {
    "audit_floor": 0.0,
    "audit_scale": 0.0,
    "audit_least": 0.0,
    "probation_waiting": 99,
    "probation_rollouts": 4,
}
"""Trusted nodes are never drawn for audit."""


@pytest.fixture
def unseen(make_house):
    return make_house(trust=UNSEEN, run={"steps": 12})


class Books:
    """What was made up, and what a node has."""

    def __init__(self, house) -> None:
        self.house, self.made_up = house, set[str]()

    def kept(self, name: str) -> int:
        node = self.house.named(name).id
        return self.house.balance(ledger.credit(node)) + self.house.balance(ledger.escrow(node))

    def credit(self, name: str) -> int:
        return self.house.balance(ledger.credit(self.house.named(name).id))

    def garbage(self, lease: m.Lease, leave: int = 0) -> m.Submission:
        """Rollouts of full length that nobody computed, but for the last `leave` samples."""
        names = [sample.rollout for group in lease.groups for sample in group.samples]
        names = names[: len(names) - leave]
        self.made_up |= set(names)
        ids = wire.pack_ids([5] * lease.max_new_tokens)
        sent = [m.SubmittedRollout(rollout=rollout, ids=ids) for rollout in names]
        return m.Submission(rollouts=sent, partial=leave > 0)

    async def judge(self) -> int:
        """Replay and score all there is; gives how many audits that took."""
        count = await self.house.audit(lambda rollout: rollout in self.made_up)
        await self.house.score()
        return count

    async def commit(self) -> m.Batch:
        """One more step, by the work of ada."""
        step = (await self.house.ctx.database.read(self.house.ctx.run_ctx.latest)).step + 1
        while (batch := await self.house.claim_step(step)) is None:
            await self.house.work("ada")
            await self.judge()
        await self.house.commit(batch)
        return batch


async def begin(house, *names: str) -> Books:
    await house.step(0)
    for name in names:
        await house.make_trusted(name)
    return Books(house)


# --- garbage that no step takes --------------------------------------------------------------------------------------


def test_garbage_handed_in_at_the_last_moment_in_part_earns_nothing(unseen) -> None:
    async def scenario(house) -> None:
        books = await begin(house, "eve", "ada")
        before = books.kept("eve")
        lease = await house.lease("eve")
        for _ in range(2):
            await books.commit()
        await house.submit("eve", lease, books.garbage(lease, leave=1))
        await books.judge()
        assert books.kept("eve") > before, "it is in escrow"
        for _ in range(4):
            await books.commit()
            await books.judge()
        assert house.row(GROUPS, lease.groups[0].group).status == "dropped"
        assert books.kept("eve") == before, "nothing of it is kept"
        assert house.row(NODES, house.named("eve").id).status == "probation"

    unseen.run(scenario)


def test_two_keys_that_leave_a_sample_over_and_sit_on_it_earn_nothing(unseen) -> None:
    async def scenario(house) -> None:
        books = await begin(house, "eve", "mallory", "ada")
        before = books.kept("eve")
        lease = await house.lease("eve")
        await house.submit("eve", lease, books.garbage(lease, leave=1))
        await house.score()
        left = await house.lease("mallory")
        assert lease.groups[0].group in {group.group for group in left.groups}
        for _ in range(6):
            await books.commit()
            await books.judge()
        assert house.row(GROUPS, lease.groups[0].group).status == "dropped"
        assert books.kept("eve") == before
        assert books.kept("mallory") == books.credit("mallory")
        accounts = {row.account.split(":")[0] for row in house.rows(sa.select(ENTRIES.c.account).distinct())}
        assert accounts == {"issued", "escrow", "credit", "burned"}
        assert house.rows(sa.select(sa.func.sum(ENTRIES.c.tokens))) == [(0,)]

    unseen.run(scenario)


def test_garbage_that_is_left_when_the_run_ends_is_looked_at_first(make_house) -> None:
    house = make_house(trust=UNSEEN, run={"steps": 1}, eval={"tasks": 0})

    async def scenario(house) -> None:
        books = await begin(house, "eve", "ada")
        before = books.kept("eve")
        lease = await house.lease("eve")
        await house.submit("eve", lease, books.garbage(lease, leave=1))
        await house.score()
        await books.commit()
        await house.swept()
        assert house.statuses(AUDITS)["open"] == 1, "the run does not end unseen"
        await books.judge()
        await house.swept()
        assert books.credit("eve") == before
        assert house.balance(ledger.BURNED) > 0

    house.run(scenario)


def test_no_group_is_opened_once_the_last_step_has_its_batch(make_house) -> None:
    """What nobody will train on costs its node electricity, and a look."""
    house = make_house(run={"steps": 2}, learn={"groups": 1}, eval={"tasks": 0})

    async def scenario(house) -> None:
        await house.step(0)
        for step in (1, 2):
            while (batch := await house.claim_step(step)) is None:
                await house.work("ada")
                await house.audit()
                await house.score()
            lease = await house.ask("ada")
            assert (lease is None) is (step == 2), "it is no use in the last step alone"
            await house.commit(batch)

    house.run(scenario)


def test_one_rollout_of_each_submission_is_looked_at(unseen) -> None:
    async def scenario(house) -> None:
        books = await begin(house, "ada", "bob")
        lease = await house.lease("bob")
        for _ in range(2):
            await books.commit()
        await house.submit("bob", lease, house.honest(lease, keep=3))
        await house.score()
        audits = len(house.rows(sa.select(AUDITS)))
        await books.commit()
        (audit,) = house.rows(sa.select(AUDITS).order_by(AUDITS.c.opened_at))[audits:]
        assert (audit.kind, audit.rollouts.count("r")) == ("draw", 1)

    unseen.run(scenario)


# --- the honest are paid ---------------------------------------------------------------------------------------------


def test_a_node_that_drains_is_paid_for_what_it_completed_whatever_becomes_of_the_rest(unseen) -> None:
    async def scenario(house) -> None:
        books = await begin(house, "bob", "ada")
        before = books.kept("bob")
        lease = await house.lease("bob")
        for _ in range(2):
            await books.commit()
        receipt = await house.submit("bob", lease, house.honest(lease, keep=3))
        await house.score()
        for _ in range(6):
            await books.commit()
            await books.judge()
        assert house.row(GROUPS, lease.groups[0].group).status == "dropped"
        assert books.credit("bob") == before + receipt.tokens

    unseen.run(scenario)


def test_work_that_went_stale_before_its_score_or_its_replay_is_paid(unseen) -> None:
    async def scenario(house) -> None:
        books = await begin(house, "ada", "bob")
        before = books.kept("bob")
        leases = {name: await house.lease(name) for name in ("bob", "new")}
        for _ in range(2):
            await books.commit()
        while (batch := await house.claim_step(3)) is None:
            await house.work("ada")
            await books.judge()
        receipts = {name: await house.submit(name, leases[name]) for name in leases}
        await house.commit(batch)
        assert house.statuses(ROLLOUTS, lease=leases["bob"].lease) == {"dropped": 4}
        await books.judge()
        assert books.kept("bob") == before + receipts["bob"].tokens, "it was not scored yet"
        assert books.kept("new") == receipts["new"].tokens, "it was held for its replay"

    unseen.run(scenario)


# --- credit matures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mature_steps", [0, 1, 3])
def test_credit_matures_by_commits_since_payment_and_not_before(make_house, mature_steps: int) -> None:
    grants = make_house().config.coordinator.grants
    house = make_house(trust=UNSEEN, run={"steps": 12}, coordinator={"mature_steps": mature_steps, "grants": grants})

    async def scenario(house) -> None:
        books = await begin(house, "ada", "bob")
        lease = await house.lease("bob")
        await books.commit()
        before = books.credit("bob")
        await house.submit("bob", lease)
        await house.score()
        paid = house.rows(sa.select(ROLLOUTS).where(ROLLOUTS.c.lease == lease.lease))
        assert {row.escrow_step for row in paid} == {1}, "paid while step 1 was the latest, for work of step 0"
        others = books.kept("bob") - before - sum(row.tokens for row in paid)
        while house.row(ROLLOUTS, paid[0].rollout).status != "trained" or books.credit("bob") <= before + others:
            latest = (await house.ctx.database.read(house.ctx.run_ctx.latest)).step
            assert latest <= 1 + max(mature_steps, 1)
            is_due = latest >= 1 + mature_steps and house.row(ROLLOUTS, paid[0].rollout).status == "trained"
            assert not is_due, "it should be credit by now"
            await books.commit()

    house.run(scenario)


def test_what_matures_is_found_by_an_index(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await house.work("ada", 2)
        seen: list[str] = []
        engine = house.ctx.database.engine
        with engine.connect() as connection:
            sa.event.listen(connection, "before_cursor_execute", lambda *told: seen.append(_inlined(told[2], told[3])))
            payment.mature(connection, house.ctx.run_ctx, 0.0)
            connection.execute(leasing._ABANDONED, {"ids": ["a", "b"], "since": 1.0})
            asked = [next(text for text in seen if text.startswith("UPDATE")), seen[-1]]
            plans = [connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}").all() for text in asked]
            plan = [row[3] for rows in plans for row in rows]
            connection.rollback()
        assert any("rollouts USING INDEX rollout_escrow" in line for line in plan), plan
        assert any("audit_undecided" in line for line in plan), plan
        assert any("lease_given_up" in line for line in plan), plan
        assert not any(line.startswith("SCAN") for line in plan), plan

    house.run(scenario)


def _inlined(statement: str, values) -> str:
    """A statement with its values in it, for EXPLAIN."""
    for value in values:
        statement = statement.replace("?", "NULL" if value is None else repr(value), 1)
    return statement


# --- one text that nobody can score ----------------------------------------------------------------------------------


async def fail_to_score(house, lease: m.Lease, group: str) -> None:
    """No scorer can judge what was handed in for this group under this lease; all else waits."""
    mine = {row.rollout for row in house.rows(sa.select(ROLLOUTS).where(ROLLOUTS.c.lease == lease.lease))}
    mine &= {row.rollout for row in house.rows(sa.select(ROLLOUTS).where(ROLLOUTS.c.group == group))}
    for _ in range(house.config.scorer.faults):
        jobs = (await house.tell("scorer", "scores/claim", m.Claim(limit=64), m.ScoreJobs)).jobs
        results = [m.ScoreResult(rollout=job.rollout, error="took too long") for job in jobs if job.rollout in mine]
        await house.tell("scorer", "scores", m.Scores(results=results), m.Done)


async def shared_group(house) -> tuple[m.Lease, str]:
    """Three samples by ada, none scored yet; the lease of eve, who has the fourth; their group."""
    await begin(house, "eve", "mallory", "ada")
    lease = await house.lease("ada")
    await house.submit("ada", lease, house.honest(lease, keep=3))
    return await house.lease("eve", slots=1), lease.groups[0].group


def test_a_text_that_cannot_be_scored_costs_its_own_sample_alone(unseen) -> None:
    async def scenario(house) -> None:
        bad, group = await shared_group(house)
        await house.submit("eve", bad)
        await fail_to_score(house, bad, group)
        eve = house.named("eve").id
        assert house.row(GROUPS, group).status == "open"
        assert house.statuses(ROLLOUTS, node=eve, group=group) == {"rejected": 1}
        (audit,) = house.rows(sa.select(AUDITS).where(AUDITS.c.status == "open"))
        assert (audit.node, audit.kind) == (eve, "suspicion"), "it was never replayed"
        again = await house.lease("bob")
        assert [s.index for g in again.groups if g.group == group for s in g.samples] == [3]
        await house.submit("bob", again)
        await house.audit(lambda rollout: house.row(ROLLOUTS, rollout).node == eve)
        await house.score()
        assert house.row(GROUPS, group).status == "complete"
        assert house.rows(sa.select(VERDICTS.c.node, VERDICTS.c.outcome)) == [(eve, "void")]
        paid = house.rows(sa.select(ROLLOUTS).where(ROLLOUTS.c.group == group, ROLLOUTS.c.escrow_step.is_not(None)))
        assert len(paid) == 4

    unseen.run(scenario)


def test_where_nobody_s_text_can_be_scored_the_group_goes_and_its_siblings_are_paid(unseen) -> None:
    async def scenario(house) -> None:
        first, group = await shared_group(house)
        ada = house.named("ada").id
        before = house.balance(ledger.escrow(ada))
        await house.submit("eve", first)
        await fail_to_score(house, first, group)
        assert house.row(GROUPS, group).status == "open"
        second = await house.lease("mallory", slots=1)
        await house.submit("mallory", second)
        await house.audit()
        assert house.row(NODES, house.named("eve").id).status == "trusted", "the text was what its seed gives"
        await fail_to_score(house, second, group)
        assert house.row(GROUPS, group).status == "dropped"
        siblings = house.rows(sa.select(ROLLOUTS).where(ROLLOUTS.c.group == group, ROLLOUTS.c.node == ada))
        siblings = [row for row in siblings if row.status != "expired"]
        assert [row.status for row in siblings] == ["dropped"] * 3
        assert house.balance(ledger.escrow(ada)) == before + sum(row.tokens for row in siblings)

    unseen.run(scenario)


# --- a pause ---------------------------------------------------------------------------------------------------------


def test_a_node_that_hands_in_a_part_waits_as_one_that_hands_a_lease_back(unseen) -> None:
    async def scenario(house) -> None:
        await begin(house, "bob")
        house.clock.now += 300
        granted = 0
        for _ in range(120):
            if (lease := await house.ask("bob")) is not None:
                granted += 1
                await house.submit("bob", lease, house.honest(lease, keep=1))
                await house.score()
            house.clock.now += 0.5
        assert 4 <= granted <= 8, "1, 2, 4, … seconds apart"
        assert house.statuses(LEASES, is_partial=True) == {"submitted": granted}

    unseen.run(scenario)
