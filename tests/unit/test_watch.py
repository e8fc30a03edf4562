"""Flips that serve the node: honest ones stay where they are however noisy, steering shows, each rollout once."""

import numpy as np
import pytest
from tests.conftest import FP32

from farflung.trust import watch
from farflung.trust.evidence import LIKED, Profile, Seen, Tally
from farflung.trust.record import NodeRecord, TrustSettings, watch_groups
from farflung.trust.watch import WatchedRollout

PROFILE = Profile("p", (0.1, 1.0), (0.3, 0.05, 1e-4), Tally((1, 1, 1), (0, 0, 0)), **FP32)
SETTINGS = TrustSettings()


def look(flips: int, reward: float) -> WatchedRollout:
    """One rollout whose profile allows a flip, none of whose flips the policy likes."""
    return WatchedRollout(flips, 0, 1.0, reward, LIKED)


def replayed(logits: np.ndarray, scores: np.ndarray, sent: np.ndarray) -> Seen:
    """What a replay with these scores sees of the tokens that were sent."""
    at, order = np.arange(len(scores)), np.argsort(scores, axis=1)
    first, second = order[:, -1], order[:, -2]
    gap, margin = scores[at, first] - scores[at, second], scores[at, first] - scores[at, sent]
    return Seen(gap, margin, np.full(len(at), 0.5), logits[at, second] - logits[at, first])


def group(
    rng: np.random.Generator, *, noise: float, teacher: float = 0.0, lean: float = 0.5, size: int = 16
) -> list[WatchedRollout]:
    """A node's samples of one task. `noise` multiplies what its arithmetic flips of what is allowed; answers with more
    near-ties are more often wrong. A teacher turns so large a share of the wrong ones that have a near-tie right.
    `lean` is the share of flips that the policy likes.
    """
    looks: list[WatchedRollout] = []
    ease = rng.uniform(0.05, 0.6)
    for _ in range(size):
        allowed = rng.gamma(2.0, 0.3)
        reward = float(rng.random() < ease * np.exp(-allowed / 2))
        flips = int(rng.poisson(allowed * noise))
        if not reward and rng.random() < teacher:
            flips, reward = flips + 1, 1.0
        looks.append(WatchedRollout(flips, int(rng.binomial(flips, lean)), allowed, reward, LIKED))
    return looks


def life(rng: np.random.Generator, groups: int, **how: float | int) -> tuple[float, int | None]:
    """The highest M of both tests, and the group at which it was ejected, if it was."""
    record, highest = NodeRecord(status="trusted"), 0.0
    for number in range(1, groups + 1):
        record, outcome = watch_groups(record, [group(rng, **how)], SETTINGS)
        highest = max(highest, record.watched.statistic)
        if outcome.kind == "eject":
            return highest, number
    return highest, None


@pytest.mark.parametrize(("noise", "lean"), [(0.2, 0.5), (1.0, 0.5), (1.0, LIKED)])
def test_honest_flips_never_eject_and_reach_x_with_probability_one_in_x(noise: float, lean: float) -> None:
    rng = np.random.default_rng(1)
    lives = [life(rng, 60, noise=noise, lean=lean) for _ in range(100)]
    assert not any(ejected for _, ejected in lives)
    for level in (5.0, 20.0, 100.0):
        assert np.mean([highest >= level for highest, _ in lives]) <= 1 / level + 0.04


def test_even_far_noisier_machines_do_not_steer() -> None:
    """Five times as many flips as allowed: too many, and so audited; but they follow no reward."""
    rng = np.random.default_rng(2)
    record = NodeRecord(status="trusted")
    for _ in range(60):
        record, outcome = watch_groups(record, [group(rng, noise=5.0)], SETTINGS)
        assert outcome.kind != "eject"
    assert record.status == "probation"
    assert record.watched.serving < 1e3


@pytest.mark.parametrize("teacher", [0.1, 0.2, 0.4])
def test_a_teacher_that_turns_some_answers_right_is_ejected(teacher: float) -> None:
    rng = np.random.default_rng(3)
    caught = [life(rng, 200, noise=0.3, teacher=teacher)[1] for _ in range(20)]
    assert all(caught), caught
    assert np.median(caught) <= {0.1: 90, 0.2: 40, 0.4: 15}[teacher]


def test_groups_without_variance_or_flips_say_nothing_of_steering() -> None:
    for looks in ([look(3, 1.0)] * 4, [look(0, 0.0), look(0, 1.0)], []):
        assert not watch.group_ratios(looks).steering.any()
        assert watch.gain(looks) == 0


def test_the_e_values_have_mean_one_by_hand() -> None:
    """One flip among two samples of equal weight: as likely in the right one as in the wrong one."""
    right, wrong = ([look(x, 1.0), look(1 - x, 0.0)] for x in (1, 0))
    mean = (np.exp(watch.group_ratios(right).steering) + np.exp(watch.group_ratios(wrong).steering)) / 2
    assert mean == pytest.approx([1, 1])


@pytest.mark.parametrize("likely", [0.5, LIKED, 0.95, 1.0])
def test_a_flip_that_leans_as_far_as_the_profile_says_has_mean_one(likely: float) -> None:
    """At 1, where nothing is known of honest flips, no flip speaks against a node."""
    ratios = [np.exp(watch.group_ratios([WatchedRollout(1, liked, 0.1, 0.0, likely)]).leaning) for liked in (0, 1)]
    assert (1 - likely) * ratios[0] + likely * ratios[1] == pytest.approx([1, 1])


@pytest.mark.parametrize(("lean", "most"), [(1.0, 15), (0.9, 40)])
def test_a_teacher_that_says_what_the_policy_likes_is_ejected_whatever_its_reward(lean: float, most: int) -> None:
    rng = np.random.default_rng(4)
    caught = [life(rng, 200, noise=0.5, lean=lean)[1] for _ in range(20)]
    assert all(caught), caught
    assert np.median(caught) <= most


def test_what_is_said_names_the_test_that_ejects() -> None:
    record, reasons = NodeRecord(status="trusted"), []
    for _ in range(12):
        record, outcome = watch_groups(record, [[WatchedRollout(4, 4, 9.0, 1.0, LIKED)] * 4], SETTINGS)
        reasons.append(outcome.reason)
    assert record.status == "ejected"
    assert any("follow what the policy likes" in reason for reason in reasons)


@pytest.mark.parametrize("noise", [0.003, 0.03, 0.3])
def test_rounding_sends_the_likelier_token_at_most_every_second_time(noise: float) -> None:
    """The premise: Gumbel noise chooses, and errors of the scores know nothing of which token is likelier."""
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 2, (200_000, 12)) + np.linspace(0, 3, 12)
    scores = logits + rng.gumbel(size=logits.shape)
    sent = (scores + noise * rng.normal(size=scores.shape)).argmax(axis=1)
    seen = replayed(logits, scores, sent)
    found = watch.count_flips(PROFILE, seen)
    thirds = int((seen.margin > seen.gap).sum())
    assert found.flips > 100
    assert found.liked - thirds <= (found.flips - thirds) / 2 + 3 * np.sqrt(found.flips) / 2
    assert found.liked <= 0.6 * found.flips, "far below what is forgiven even where third tokens abound"
    order, at = np.argsort(scores, axis=1), np.arange(len(scores))
    best, second = order[:, -1], order[:, -2]
    is_near = (scores[at, best] - scores[at, second] < noise) & (logits[at, second] > logits[at, best])
    taught = watch.count_flips(PROFILE, replayed(logits, scores, np.where(is_near, second, best)))
    assert taught.liked == taught.flips > 100


def test_a_flip_to_a_third_token_counts_as_liked() -> None:
    seen = Seen(*(np.array(part) for part in ([0.1, 0.1, 0.1], [0.1, 0.15, 0.0], [0.5] * 3, [-1.0, -1.0, 1.0])))
    assert watch.count_flips(PROFILE, seen)[:2] == (2, 1)


def test_what_a_profile_allows() -> None:
    seen = Seen(*(np.array(part, float) for part in ([0.05, 0.5, 3.0], [0.05, 0.0, 0.0], [0.5] * 3, [-1.0] * 3)))
    assert watch.count_flips(PROFILE, seen) == (1, 0, pytest.approx(0.3501))
    assert watch.bits(PROFILE, seen) == pytest.approx(0.8813 + 0.2864 + 0.00147, abs=1e-3)
