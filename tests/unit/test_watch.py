"""Flips that serve the node: honest ones stay where they are however noisy, steering shows, each rollout once."""

import numpy as np
import pytest

from farflung.trust import watch
from farflung.trust.evidence import Profile, Seen, Tally
from farflung.trust.record import NodeRecord, TrustSettings, look_over
from farflung.trust.watch import Look

PROFILE = Profile("p", (0.1, 1.0), (0.3, 0.05, 1e-4), Tally((1, 1, 1), (0, 0, 0)))
SETTINGS = TrustSettings()


def group(rng: np.random.Generator, *, noise: float, teacher: float = 0.0, size: int = 16) -> list[Look]:
    """A node's samples of one task. `noise` multiplies what its arithmetic flips of what is allowed; answers with more
    near-ties are more often wrong. A teacher turns so large a share of the wrong ones that have a near-tie right.
    """
    looks: list[Look] = []
    ease = rng.uniform(0.05, 0.6)
    for _ in range(size):
        allowed = rng.gamma(2.0, 0.3)
        reward = float(rng.random() < ease * np.exp(-allowed / 2))
        flips = int(rng.poisson(allowed * noise))
        if not reward and rng.random() < teacher:
            flips, reward = flips + 1, 1.0
        looks.append(Look(flips, allowed, reward))
    return looks


def life(rng: np.random.Generator, groups: int, **how: float) -> tuple[float, int | None]:
    """The highest M of both tests, and the group at which it was ejected, if it was."""
    record, highest = NodeRecord(status="trusted"), 0.0
    for number in range(1, groups + 1):
        record, outcome = look_over(record, [group(rng, **how)], SETTINGS)
        highest = max(highest, record.watched.statistic)
        if outcome.kind == "eject":
            return highest, number
    return highest, None


@pytest.mark.parametrize("noise", [0.2, 1.0])
def test_honest_flips_never_eject_and_reach_x_with_probability_one_in_x(noise: float) -> None:
    rng = np.random.default_rng(1)
    lives = [life(rng, 60, noise=noise) for _ in range(100)]
    assert not any(ejected for _, ejected in lives)
    for level in (5.0, 20.0, 100.0):
        assert np.mean([highest >= level for highest, _ in lives]) <= 1 / level + 0.04


def test_even_far_noisier_machines_do_not_steer() -> None:
    """Five times as many flips as allowed: too many, and so audited; but they follow no reward."""
    rng = np.random.default_rng(2)
    record = NodeRecord(status="trusted")
    for _ in range(60):
        record, outcome = look_over(record, [group(rng, noise=5.0)], SETTINGS)
        assert outcome.kind != "eject"
    assert record.status == "probation"
    assert sum(record.watched.steering) / 2 < 1e3


@pytest.mark.parametrize("teacher", [0.1, 0.2, 0.4])
def test_a_teacher_that_turns_some_answers_right_is_ejected(teacher: float) -> None:
    rng = np.random.default_rng(3)
    caught = [life(rng, 200, noise=0.3, teacher=teacher)[1] for _ in range(20)]
    assert all(caught), caught
    assert np.median(caught) <= {0.1: 90, 0.2: 40, 0.4: 15}[teacher]


def test_groups_without_variance_or_flips_say_nothing_of_steering() -> None:
    for looks in ([Look(3, 1.0, 1.0)] * 4, [Look(0, 1.0, 0.0), Look(0, 1.0, 1.0)], []):
        assert not watch.group_ratios(looks)[1].any()
        assert watch.gain(looks) == 0


def test_the_e_values_have_mean_one_by_hand() -> None:
    """One flip among two samples of equal weight: as likely in the right one as in the wrong one."""
    right, wrong = ([Look(x, 1.0, 1.0), Look(1 - x, 1.0, 0.0)] for x in (1, 0))
    mean = (np.exp(watch.group_ratios(right)[1]) + np.exp(watch.group_ratios(wrong)[1])) / 2
    assert mean == pytest.approx([1, 1])


def test_what_a_profile_allows() -> None:
    seen = Seen(*(np.array(part, float) for part in ([0.05, 0.5, 3.0], [0.05, 0.0, 0.0], [0.5] * 3, [-1.0] * 3)))
    assert watch.flips_and_allowed(PROFILE, seen) == (1, pytest.approx(0.3501))
    assert watch.bits(PROFILE, seen) == pytest.approx(0.8813 + 0.2864 + 0.00147, abs=1e-3)
