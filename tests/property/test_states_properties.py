"""Leases, rollouts and groups driven at random through the one check; whatever happens, nothing is lost or doubled."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from farflung.protocol import states
from farflung.protocol.errors import IllegalTransition

SAMPLES = 3
GROUPS = ("g0", "g1", "g2")
EARNED = {"accepted", "batched", "trained"}
picks = st.integers(0, 10**6)


class Lives(RuleBasedStateMachine):
    """Three groups of three samples. Every change of status goes through `move`, and so through `states.check`."""

    def __init__(self) -> None:
        super().__init__()
        self.status: dict[tuple[str, str], str] = {("group", group): "open" for group in GROUPS}
        self.story: dict[tuple[str, str], list[str]] = {}
        self.sample_of: dict[str, tuple[str, int]] = {}
        self.lease_of: dict[str, str] = {}
        self.ever_accepted: set[str] = set()

    def born(self, noun: str, id: str) -> None:
        self.status[noun, id] = states.first(noun)

    def move(self, noun: str, id: str, after: str) -> None:
        key = (noun, id)
        self.status[key] = states.check(noun, id, self.status[key], after, self.story.get(key, []))
        self.story.setdefault(key, []).append(after)
        if (noun, after) == ("rollout", "accepted"):
            self.ever_accepted.add(id)

    def those(self, noun: str, *statuses: str) -> list[str]:
        return [id for (kind, id), status in self.status.items() if kind == noun and status in statuses]

    def one(self, pick: int, noun: str, *statuses: str) -> list[str]:
        """One of those, as a list that may be empty."""
        found = self.those(noun, *statuses)
        return [found[pick % len(found)]] if found else []

    def live(self, sample: tuple[str, int]) -> list[str]:
        return [
            r for r, s in self.sample_of.items() if s == sample and self.status["rollout", r] not in states.REOPENING
        ]

    def in_group(self, group: str) -> list[str]:
        return [id for id, (of, _) in self.sample_of.items() if of == group]

    # workers

    @rule(wanted=st.integers(1, 4))
    def lease(self, wanted: int) -> None:
        samples = [(group, i) for group in self.those("group", "open") for i in range(SAMPLES)]
        free = [sample for sample in samples if not self.live(sample)][:wanted]
        lease = f"l{len(self.those('lease', *states.statuses('lease')))}"
        if free:
            self.born("lease", lease)
        for sample in free:
            rollout = f"r{len(self.sample_of)}"
            self.born("rollout", rollout)
            self.sample_of[rollout], self.lease_of[rollout] = sample, lease

    @rule(pick=picks, complete=st.integers(0, 4), is_drawn=st.booleans())
    def submit(self, pick: int, complete: int, is_drawn: bool) -> None:
        for lease in self.one(pick, "lease", "open"):
            rollouts = [id for id, of in self.lease_of.items() if of == lease]
            self.move("lease", lease, "submitted")
            for place, rollout in enumerate(rollouts):
                taken = "held" if is_drawn else "received"
                self.move("rollout", rollout, taken if place < complete else "expired")

    @rule(pick=picks, how=st.sampled_from(["returned", "expired", "void"]))
    def lose(self, pick: int, how: str) -> None:
        for lease in self.one(pick, "lease", "open"):
            self.move("lease", lease, how)
            for rollout in [id for id, of in self.lease_of.items() if of == lease]:
                self.move("rollout", rollout, "expired")

    # validator, scorer, trainer

    @rule(pick=picks, verdict=st.sampled_from(["received", "rejected", "void"]))
    def replay(self, pick: int, verdict: str) -> None:
        for rollout in self.one(pick, "rollout", "held"):
            self.move("rollout", rollout, verdict)

    @rule(pick=picks)
    def score(self, pick: int) -> None:
        for rollout in self.one(pick, "rollout", "received"):
            self.move("rollout", rollout, "accepted")
            group = self.sample_of[rollout][0]
            if sum(self.status["rollout", r] == "accepted" for r in self.in_group(group)) == SAMPLES:
                self.move("group", group, "complete")

    @rule(pick=picks)
    def convict(self, pick: int) -> None:
        """A verdict voids what a lease's node has made, up to what is batched."""
        for lease in self.one(pick, "lease", "submitted"):
            for rollout in [id for id, of in self.lease_of.items() if of == lease]:
                if states.is_legal("rollout", self.status["rollout", rollout], "void"):
                    self.move("rollout", rollout, "void")
                    self.reopen(self.sample_of[rollout][0])

    def reopen(self, group: str) -> None:
        if self.status["group", group] == "complete":
            self.move("group", group, "open")

    @rule(pick=picks, use=st.sampled_from(["batched", "dropped"]))
    def batch(self, pick: int, use: str) -> None:
        for group in self.one(pick, "group", "complete"):
            self.move("group", group, use)
            for rollout in self.in_group(group):
                if self.status["rollout", rollout] == "accepted":
                    self.move("rollout", rollout, use)

    @rule(pick=picks)
    def train(self, pick: int) -> None:
        for group in self.one(pick, "group", "batched"):
            self.move("group", group, "trained")
            for rollout in self.in_group(group):
                if self.status["rollout", rollout] == "batched":
                    self.move("rollout", rollout, "trained")

    # what the tables forbid

    @precondition(lambda self: self.status)
    @rule(pick=picks, after=st.sampled_from(sorted({s for n in states.LIFECYCLES for s in states.statuses(n)})))
    def try_what_is_illegal(self, pick: int, after: str) -> None:
        noun, id = sorted(self.status)[pick % len(self.status)]
        if states.is_legal(noun, self.status[noun, id], after):
            return
        before, story = dict(self.status), self.story.get((noun, id), [])[:]
        with pytest.raises(IllegalTransition, match=id) as caught:
            self.move(noun, id, after)
        assert self.status == before
        assert self.story.get((noun, id), []) == story
        assert repr(after) in str(caught.value)
        assert all(event in str(caught.value) for event in story)

    # what must always hold

    @invariant()
    def no_sample_has_two_live_rollouts(self) -> None:
        for sample in set(self.sample_of.values()):
            assert len(self.live(sample)) <= 1

    @invariant()
    def no_accepted_rollout_vanishes(self) -> None:
        """Once accepted it is trained on, or a verdict or a drop says why not; it never lapses back."""
        for rollout in self.ever_accepted:
            assert self.status["rollout", rollout] in EARNED | {"void", "dropped"}

    @invariant()
    def a_group_past_open_is_whole(self) -> None:
        for group in self.those("group", "complete", "batched", "trained"):
            earned = [id for id in self.in_group(group) if self.status["rollout", id] in EARNED]
            assert sorted(self.sample_of[id][1] for id in earned) == list(range(SAMPLES))

    @invariant()
    def a_lease_that_ended_leases_nothing(self) -> None:
        for rollout in self.those("rollout", "leased"):
            assert self.status["lease", self.lease_of[rollout]] == "open"

    @invariant()
    def nothing_is_scored_before_its_replay(self) -> None:
        for (noun, _), story in self.story.items():
            if noun == "rollout" and "held" in story and "accepted" in story:
                assert story[story.index("held") + 1] == "received"


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=60, stateful_step_count=60)
