"""The coordinator driven at random over its real database: in whatever order things come, nothing is lost or doubled.

Three nodes lease, submit in whole or in part, hand back or fall silent; two validators and a scorer claim and answer,
or do not; the trainer claims and commits; the coordinator is restarted. `House.check` looks at everything after each.
"""

import asyncio
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from farflung.protocol import messages as m
from farflung.protocol.errors import Conflict, Ejected, LeaseGone
from farflung.store import ledger
from farflung.store.tables import NODES, ROLLOUTS, VERDICTS

WORKERS = st.sampled_from(["ada", "bob", "eve"])
LEASE = {"rollouts": 6, "lease_s": 100.0, "lost_s": 40.0, "ahead": 6.0}
ACTIONS: list[tuple[str, dict[str, Any]]] = []
VALIDATORS = st.sampled_from(["val-1", "val-2"])


def action(weight: int, **wanted: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Something that may happen, `weight` times as often as others. One rule draws them all: hypothesis leaves whole
    rules out of an example, and without some of these no rollout ever comes far."""

    def mark(method: Callable[..., None]) -> Callable[..., None]:
        ACTIONS.extend([(method.__name__, wanted)] * weight)
        return method

    return mark


def test_the_coordinator_keeps_its_books_whatever_happens(make_house, tmp_path) -> None:
    template = make_house(
        run={"steps": 6}, trust={"probation_rollouts": 6, "audit_scale": 2.0}, learn={"groups": 1}, lease=LEASE
    )
    number = iter(range(10**6))

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.loop = asyncio.new_event_loop()
            folder = tmp_path / f"example-{next(number)}"
            shutil.copytree(template.config.run.dir, folder)
            run = template.config.run.model_copy(update={"dir": folder})
            self.folder, self.config = folder, template.config.model_copy(update={"run": run})
            self.house = self.do(type(template).open(self.config))
            self.leases: dict[str, m.Lease] = {}
            self.jobs: list[tuple[str, m.AuditJob]] = []
            self.batch: m.Batch | None = None
            self.answered: Counter[str] = Counter()

        def do(self, what):
            return self.loop.run_until_complete(what)

        def teardown(self) -> None:
            self.hang_up()
            self.house.close()
            self.loop.close()
            shutil.rmtree(self.folder)

        def hang_up(self) -> None:
            for client in self.house.clients.values():
                self.do(client.close())
            self.house.clients.clear()

        @initialize()
        def first_weights(self) -> None:
            self.do(self.house.step(0))

        @rule(data=st.data())
        def act(self, data: st.DataObject) -> None:
            name, wanted = data.draw(st.sampled_from(ACTIONS))
            getattr(self, name)(**{argument: data.draw(strategy) for argument, strategy in wanted.items()})

        # workers

        @contextmanager
        def unless_ejected(self, name: str) -> Iterator[None]:
            """Whatever a node asks for; one that is ejected may not even register after a restart."""
            try:
                yield
            except Ejected:
                assert self.house.row(NODES, self.house.named(name).id).status == "ejected"

        @action(3, name=WORKERS, loaded=st.integers(-1, 6))
        def lease(self, name: str, loaded: int) -> None:
            with self.unless_ejected(name):
                if (found := self.do(self.house.ask(name, loaded_step=loaded))) is not None:
                    self.leases[name] = found

        @action(3, name=WORKERS, keep=st.sampled_from([None, None, None, 1, 2, 3]), twice=st.booleans())
        def submit(self, name: str, keep: int | None, twice: bool) -> None:
            if name not in self.leases:
                return
            lease = self.leases[name]
            submission = self.house.honest(lease, keep=keep)
            try:
                with self.unless_ejected(name):
                    receipt = self.do(self.house.submit(name, lease, submission))
                    assert not twice or self.do(self.house.submit(name, lease, submission)) == receipt
            except LeaseGone:
                assert self.house.story(lease.lease)[-1] != "open"

        @action(1, name=WORKERS)
        def give_back(self, name: str) -> None:
            if name in self.leases:
                with self.unless_ejected(name):
                    self.do(self.house.give_back(name, self.leases[name]))

        @action(2, after_s=st.sampled_from([0, 5, 31, 45, 101]))
        def wait(self, after_s: int) -> None:
            self.do(self.house.swept(after_s=after_s))

        @action(6, names=st.lists(WORKERS, min_size=1, max_size=6))
        def work(self, names: list[str]) -> None:
            for name in names:
                self.lease(name, -1)
                self.submit(name, None, False)

        # those who judge

        @action(2, name=VALIDATORS, limit=st.integers(1, 3))
        def claim_audits(self, name: str, limit: int) -> None:
            self.jobs += [(name, job) for job in self.do(self.house.claim_audits(name, limit))]

        @action(2, pick=st.integers(0, 99), is_bad=st.booleans())
        def testify(self, pick: int, is_bad: bool) -> None:
            if not self.jobs:
                return
            name, job = self.jobs[pick % len(self.jobs)]
            eve = self.house.named("eve").id
            whose = {row.rollout: row.node for row in self.house.rows(sa.select(ROLLOUTS.c.rollout, ROLLOUTS.c.node))}
            self.answered[job.audit] += self.do(
                self.house.testify(job, lambda rollout: is_bad and whose[rollout] == eve, name)
            )
            assert self.answered[job.audit] <= 1, "evidence on one audit counted twice"

        @action(2, limit=st.integers(1, 8), faults=st.booleans(), even=st.booleans())
        def score(self, limit: int, faults: bool, even: bool) -> None:
            jobs = self.do(self.house.tell("scorer", "scores/claim", m.Claim(limit=limit), m.ScoreJobs)).jobs
            results = [
                m.ScoreResult(
                    rollout=job.rollout,
                    reward=1.0 if even else self.house.by_parity(job.rollout),
                    error="it fell over" if faults and number % 2 else "",
                )
                for number, job in enumerate(jobs)
            ]
            for _ in range(2 if results else 0):
                self.do(self.house.tell("scorer", "scores", m.Scores(results=results), m.Done))

        @action(5, is_bad=st.booleans())
        def judge_all(self, is_bad: bool) -> None:
            eve = self.house.named("eve").id
            for name in ("val-1", "val-2"):
                self.do(
                    self.house.audit(lambda rollout: is_bad and self.house.row(ROLLOUTS, rollout).node == eve, name)
                )
            self.do(self.house.score())

        # the trainer

        @action(1)
        def claim_step(self) -> None:
            latest = self.do(self.house.ctx.database.read(self.house.ctx.run_ctx.latest))
            batch = self.do(self.house.claim_step(latest.step + 1))
            if batch is not None and self.batch is not None and batch.step == self.batch.step:
                assert batch.groups == self.batch.groups, "a step was claimed twice with different contents"
            self.batch = batch or self.batch

        @action(4, again=st.booleans(), is_claimed_first=st.booleans())
        def commit(self, again: bool, is_claimed_first: bool) -> None:
            if is_claimed_first:
                self.claim_step()
            if self.batch is None:
                return
            changed = self.do(self.house.commit(self.batch))
            assert not again or self.do(self.house.commit(self.batch)) == 0
            assert changed in (0, 1)

        @action(1, step=st.integers(0, 9))
        def claim_some_step(self, step: int) -> None:
            latest = self.do(self.house.ctx.database.read(self.house.ctx.run_ctx.latest))
            try:
                found = self.do(self.house.claim_step(step))
            except Conflict:
                assert step > latest.step + 1
            else:
                assert found is None or found.step == step <= latest.step + 1

        @action(1)
        def restart(self) -> None:
            self.hang_up()
            self.house.close()
            self.house = self.do(type(template).open(self.config, self.house.clock))

        # what must hold

        @invariant()
        def the_books_are_in_order(self) -> None:
            self.house.check()

        @invariant()
        def only_eve_is_ever_judged(self) -> None:
            nodes = {row[0] for row in self.house.rows(sa.select(VERDICTS.c.node))}
            assert nodes <= {self.house.named("eve").id}

        @invariant()
        def the_ejected_own_nothing(self) -> None:
            for row in self.house.rows(sa.select(NODES.c.node).where(NODES.c.status == "ejected")):
                assert self.house.balance(ledger.escrow(row.node)) == 0
                live = self.house.statuses(ROLLOUTS, node=row.node)
                assert not set(live) & {"leased", "held", "received", "accepted"}

    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        lambda: Machine(),  # given the class itself, hypothesis parses this whole file, which fails at times
        settings=settings(max_examples=10, stateful_step_count=50, suppress_health_check=checks),
    )
