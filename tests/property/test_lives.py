"""Whole lives of honest nodes through the code that leases and the code that folds, voided samples coming back.

A node's arithmetic is deterministic: what it flips of a sample once, it flips again. The premise of the bound is that
each factor's mean given the past is at most 1, which such a sample would break if it came back to its node.
"""

import math
from collections import defaultdict

import numpy as np
import pytest
from tests.conftest import FP32

from farflung.tasks.allocator import Allocator
from farflung.tasks.assign import Asker, AssignSettings, OpenSamples, Plan
from farflung.trust import evidence
from farflung.trust.evidence import Profile, Seen, Tally
from farflung.trust.record import Finding, NodeRecord, TrustSettings, confirm, fold

SCALE, TOKENS, SAMPLES = 0.08, 22, 4
EDGES = tuple(0.002 * 2 ** (i / 4) for i in range(40))
ODD_SAMPLE = 25
"""One sample of each life is arbitrarily bad, as of a card that was too hot; it is as bad whenever it is done."""
SETTINGS, ASSIGN = TrustSettings(), AssignSettings(lease_rollouts=SAMPLES, group_size=SAMPLES)


def flip_probability(gap: float) -> float:
    """P(a normal number of SCALE > gap)."""
    return 0.5 * math.erfc(gap / (SCALE * 2**0.5))


PROFILE = Profile(
    "exactly as calibrated",
    EDGES,
    tuple(max(flip_probability(low), 1e-4) for low in (0.0, *EDGES)),
    Tally((1,) * (len(EDGES) + 1), (0,) * (len(EDGES) + 1)),
    **FP32,
)
"""Its bound is what these nodes do at every edge, and hardly more between two of them: nothing is forgiven besides."""


class Life:
    """One node, and a coordinator's work for it: groups are opened one after the other, void samples are open again."""

    def __init__(self, seed: int, *, is_kept_away: bool) -> None:
        self.rng, self.is_kept_away = np.random.default_rng(seed), is_kept_away
        self.record, self.opened = NodeRecord(), 0
        self.again: dict[str, list[int]] = defaultdict(list)
        self.said: dict[tuple[str, int], Finding] = {}
        """What its arithmetic makes of a sample: the same each time."""
        self.factors: list[np.ndarray] = []

    def finding(self, group: str, sample: int) -> Finding:
        if (group, sample) not in self.said:
            gap = self.rng.exponential(1.2, TOKENS)
            is_odd = len(self.said) == ODD_SAMPLE
            margin = (
                gap + 2 if is_odd else np.where(self.rng.normal(0, SCALE, TOKENS) > gap, np.maximum(gap, 2e-5), 0.0)
            )
            seen = Seen(gap, margin, self.rng.uniform(0.2, 1, TOKENS), self.rng.normal(-1, 1.5, TOKENS))
            ratios = tuple(evidence.log_ratios(PROFILE, seen).tolist())
            self.said[group, sample] = Finding("r", TOKENS, evidence.flips(seen), ratios)
        return self.said[group, sample]

    def lease(self) -> list[tuple[str, int]]:
        self.opened += 1
        not_for = frozenset({"ada"}) if self.is_kept_away else frozenset[str]()
        offers = [OpenSamples(f"g{self.opened}", "t", 0, tuple(range(SAMPLES)), 1)]
        offers += [OpenSamples(g, "t", 0, tuple(left), 1, 0.0, not_for) for g, left in self.again.items() if left]
        plan = Allocator(0, offers, 1, lambda step: [], lambda: "new", ASSIGN).take(Asker(0, SAMPLES, 99, "ada"), 1.0)
        assert isinstance(plan, Plan)
        taken = [(str(share.group), sample) for share in plan.shares for sample in share.samples]
        for group, sample in taken:
            if sample in self.again[group]:
                self.again[group].remove(sample)
        return taken

    def live(self, submissions: int) -> str:
        """Hand in, be audited in full, and be judged; gives how it ends."""
        for _ in range(submissions):
            taken = self.lease()
            found = [self.finding(*one) for one in taken]
            total = evidence.submission_log_ratios([np.array(one.log_ratios) for one in found])
            self.factors.append(evidence.e_values(total))
            self.record, outcome = fold(self.record, found, SETTINGS)
            if outcome.kind == "quarantine":  # the second opinion replays the same text, and agrees
                self.record, outcome = confirm(self.record, found, SETTINGS)
            if outcome.kind == "eject":
                return "ejected"
            if outcome.kind in ("void", "release"):
                for group, sample in taken:
                    self.again[group].append(sample)
        return self.record.status


@pytest.fixture(scope="module")
def lives() -> list[tuple[Life, str]]:
    found = [Life(seed, is_kept_away=True) for seed in range(20)]
    return [(life, life.live(60)) for life in found]


def test_no_honest_life_ends_where_void_samples_go_to_others(lives) -> None:
    assert {end for _, end in lives} <= {"trusted", "probation"}
    assert {life.record.bad_submissions for life, _ in lives} == {1}


def test_each_factors_mean_is_at_most_one(lives) -> None:
    """Over all audits of all lives but for the odd one, for each alternative."""
    factors = np.concatenate([life.factors[ODD_SAMPLE // SAMPLES + 1 :] for life, _ in lives])
    error = factors.std(axis=0) / len(factors) ** 0.5
    assert (factors.mean(axis=0) <= 1 + 3 * error).all()


def test_every_life_ends_where_void_samples_come_back() -> None:
    """What the rule is for: a sample that is odd by chance is odd each time that it comes back."""
    assert {Life(seed, is_kept_away=False).live(60) for seed in range(5)} == {"ejected"}
