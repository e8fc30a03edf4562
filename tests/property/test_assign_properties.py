"""A world of nodes, leases, deadlines and new steps, driven by the very function that the coordinator uses."""

from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from farflung.protocol import states
from farflung.tasks.assign import (
    Asker,
    AssignSettings,
    NextTask,
    OpenSamples,
    Plan,
    Share,
    Wait,
    assign,
    is_fresh,
    task_order,
)

LEASE_S = 10.0
SETTINGS = AssignSettings(max_staleness=2, max_lag=1, lease_rollouts=6, lease_minimum=2, group_size=4, groups_ahead=5)
NODES = st.builds(
    Asker,
    loaded=st.one_of(st.none(), st.integers(0, 6)),
    free_slots=st.integers(0, 9),
    max_context=st.sampled_from([10, 50, 100]),
)


def needed(position: int) -> int:
    return (40, 90, 5)[position % 3]


class World(RuleBasedStateMachine):
    """Leases live until submitted, handed back or lapsed; every sample keeps the list of its rollouts."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.latest = 0.0, 0
        self.groups: dict[str, tuple[int, int]] = {}
        """Group → (step, position of its task)."""
        self.rollouts: dict[tuple[str, int], list[str]] = {}
        """Sample → the statuses of its rollouts."""
        self.reissued: dict[tuple[str, int], float] = {}
        self.leases: list[tuple[float, list[tuple[str, int]]]] = []

    # what the coordinator would read from its tables

    def owner(self, sample: tuple[str, int]) -> bool:
        return any(status not in states.REOPENING for status in self.rollouts[sample])

    def offers(self) -> Iterator[OpenSamples]:
        for (group, index), _ in self.rollouts.items():
            if not self.owner((group, index)):
                step, task = self.groups[group]
                at = self.reissued.get((group, index))
                yield OpenSamples(group, f"t{task}", step, (index,), needed(task), at)

    def next_tasks(self, step: int) -> Iterator[NextTask]:
        opened = {task for of_step, task in self.groups.values() if of_step == step}
        return (NextTask(f"t{i}", needed(i)) for i in range(12) if i not in opened)

    def fresh_groups(self) -> int:
        return sum(is_fresh(step, self.latest, SETTINGS.max_staleness) for step, _ in self.groups.values())

    # what may happen

    @rule(node=NODES)
    def ask(self, node: Asker) -> None:
        open_now = list(self.offers())
        headroom = SETTINGS.groups_ahead - self.fresh_groups()
        answer = assign(self.now, self.latest, node, open_now, self.fresh_groups(), self.next_tasks, SETTINGS)
        again = assign(self.now, self.latest, node, open_now[::-1], self.fresh_groups(), self.next_tasks, SETTINGS)
        assert answer == again
        if isinstance(answer, Wait):
            self.check_wait(node, open_now, headroom)
        else:
            self.check_plan(answer, node, headroom)
            self.lease(answer)

    def check_wait(self, node: Asker, open_now: list[OpenSamples], headroom: int) -> None:
        """Nobody waits while there is something to do."""
        due = [o for o in open_now if o.needed_tokens <= node.max_context and (o.reissued_at or 0) <= self.now]
        assert not node.free_slots or not any(is_fresh(o.step, self.latest, SETTINGS.max_staleness) for o in due)
        unopened = [task for task in self.next_tasks(self.latest) if task.needed_tokens <= node.max_context]
        assert not node.free_slots or headroom <= 0 or not unopened

    def check_plan(self, plan: Plan, node: Asker, headroom: int) -> None:
        assert is_fresh(plan.step, self.latest, SETTINGS.max_staleness)
        assert 0 < plan.rollouts <= min(SETTINGS.lease_rollouts, max(node.free_slots, SETTINGS.lease_minimum))
        assert len(plan.opened) <= max(0, headroom)
        assert not plan.opened or self.latest - plan.step <= SETTINGS.max_lag
        for share in plan.continued + plan.opened:
            assert needed(int(share.task[1:])) <= node.max_context
            assert len(set(share.samples)) == len(share.samples) > 0
        assert all(self.groups[share.group or ""][0] == plan.step for share in plan.continued)

    def lease(self, plan: Plan) -> None:
        for share in plan.opened:
            self.open_group(share, plan.step)
        taken = [
            (share.group or f"{plan.step}-{share.task}", i)
            for share in plan.continued + plan.opened
            for i in share.samples
        ]
        for sample in taken:
            assert not self.owner(sample)
            self.rollouts[sample].append(states.first("rollout"))
        self.leases.append((self.now + LEASE_S, taken))

    def open_group(self, share: Share, step: int) -> None:
        group = f"{step}-{share.task}"
        assert group not in self.groups
        self.groups[group] = (step, int(share.task[1:]))
        self.rollouts |= {(group, index): [] for index in range(SETTINGS.group_size)}

    @rule(which=st.integers(0, 99), kept=st.integers(0, 6))
    def submit(self, which: int, kept: int) -> None:
        """Complete the first few and hand back the rest."""
        if self.leases:
            _, samples = self.leases.pop(which % len(self.leases))
            self.move(samples[:kept], "received")
            self.lapse(samples[kept:])

    @rule(which=st.integers(0, 99))
    def void(self, which: int) -> None:
        received = [sample for sample, told in self.rollouts.items() if told and told[-1] == "received"]
        if received:
            sample = received[which % len(received)]
            self.move([sample], "void")
            self.reissued[sample] = self.now + 3

    @rule(passed=st.floats(0, 20))
    def wait(self, passed: float) -> None:
        self.now += passed
        late = [lease for lease in self.leases if lease[0] <= self.now]
        self.leases = [lease for lease in self.leases if lease[0] > self.now]
        for _, samples in late:
            self.lapse(samples)

    @rule()
    def commit(self) -> None:
        self.latest += 1

    def lapse(self, samples: list[tuple[str, int]]) -> None:
        self.move(samples, "expired")
        self.reissued |= dict.fromkeys(samples, self.now)

    def move(self, samples: list[tuple[str, int]], after: str) -> None:
        for sample in samples:
            told = self.rollouts[sample]
            told[-1] = states.check("rollout", str(sample), told[-1], after)

    # what must always hold

    @invariant()
    def no_sample_has_two_owners(self) -> None:
        for told in self.rollouts.values():
            assert sum(status not in states.REOPENING for status in told) <= 1

    @invariant()
    def a_leased_rollout_is_in_exactly_one_lease(self) -> None:
        held = sorted(sample for _, samples in self.leases for sample in samples)
        assert held == sorted(sample for sample, told in self.rollouts.items() if "leased" in told)


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=60, stateful_step_count=40)


@given(st.binary(min_size=32, max_size=32), st.integers(0, 10**9), st.integers(0, 70))
@settings(max_examples=40)
def test_every_order_is_a_permutation(secret: bytes, step: int, count: int) -> None:
    order = list(task_order(secret, step, count))
    assert sorted(order) == list(range(count))
    assert all(next(task_order(secret, step, count, i)) == place for i, place in enumerate(order[:5]))
