"""Likelihood ratios of replays, the process per key, profiles and their calibration."""

import math

import msgspec
import numpy as np
import pytest

from farflung.trust import evidence
from farflung.trust.evidence import Profile, Tally

PROFILE = Profile(
    "two bins",
    edges=(0.1,),
    q0=(0.3, 0.01),
    q1={"unseeded": (0.6, 0.5), "rare": (0.3, 0.1)},
    honest=Tally((100, 1000), (20, 0)),
)


def play(rng: np.random.Generator, rollouts: int, tokens: int, *, seeded: bool, spread: float = 2.0) -> list:
    """Gap and margin of rollouts by a policy over 32 tokens; a higher spread of logits makes it surer of itself."""
    shape = (rollouts, tokens, 32)
    logits, seen = rng.normal(0, spread, shape), rng.gumbel(size=shape)
    own = seen if seeded else rng.gumbel(size=shape)
    sent = (logits + own + rng.normal(0, 1e-4, shape)).argmax(-1)
    scores = logits + seen
    best = np.sort(scores, axis=-1)
    margin = best[..., -1] - np.take_along_axis(scores, sent[..., None], -1)[..., 0]
    return list(zip(best[..., -1] - best[..., -2], margin, strict=True))


@pytest.fixture(scope="module")
def profile() -> Profile:
    rng = np.random.default_rng(1)
    return evidence.calibrate(
        "simulated", play(rng, 100, 30, seeded=True), {"unseeded": play(rng, 100, 30, seeded=False)}
    )


def test_the_ratio_by_hand() -> None:
    gap, margin = np.array([0.05, 0.05, 0.5, 0.1], "f4"), np.array([0.05, 0, 0.5, 1e-6], "f4")
    by_hand = math.log(0.6 / 0.3) + math.log(0.4 / 0.7) + math.log(0.5 / 0.01) + math.log(0.5 / 0.99)
    assert evidence.tally(PROFILE.edges, gap, margin) == Tally((2, 2), (1, 1))
    assert evidence.log_likelihood_ratio(PROFILE, gap, margin, "unseeded") == pytest.approx(by_hand)


def test_alternatives_are_averaged_not_added() -> None:
    flips = Tally((0, 2), (0, 2))
    assert evidence.average_log_ratio(PROFILE, flips) == pytest.approx(math.log((50**2 + 10**2) / 2))
    many = Tally((0, 100_000), (0, 100_000))
    assert evidence.average_log_ratio(PROFILE, many) == pytest.approx(100_000 * math.log(50) - math.log(2))


def test_no_tokens_say_nothing() -> None:
    empty = np.array([], "f4")
    assert evidence.log_likelihood_ratio(PROFILE, empty, empty, "unseeded") == 0
    assert evidence.tally(PROFILE.edges, empty, empty).tokens == 0


def test_numbers_that_are_none_fail_closed() -> None:
    with pytest.raises(ValueError, match="must be numbers"):
        evidence.tally((0.1,), np.array([0.1]), np.array([np.nan]))
    with pytest.raises(ValueError, match="of one shape"):
        evidence.tally((0.1,), np.array([0.1]), np.array([0.1, 0.2]))
    assert evidence.tally((0.1,), np.array([np.inf]), np.array([np.inf])) == Tally((0, 1), (0, 1))


def test_a_factor_has_mean_one_at_q0_and_less_below() -> None:
    for q0, q1 in zip(PROFILE.q0, PROFILE.q1["unseeded"], strict=True):
        means = [p * q1 / q0 + (1 - p) * (1 - q1) / (1 - q0) for p in (0, q0 / 2, q0)]
        assert means == sorted(means)
        assert means[-1] == pytest.approx(1)


def test_one_rollout_is_capped() -> None:
    assert evidence.rollout_e(0.0) == pytest.approx(1 / 1.1)
    assert evidence.rollout_e(1e6) == evidence.rollout_e(math.log(100)) == pytest.approx(100 / 1.1)
    assert evidence.rollout_e(-1e6) == 0
    assert evidence.is_bad_rollout(math.log(100))
    assert not evidence.is_bad_rollout(4.6)


def test_the_process_by_hand() -> None:
    m1, k1 = evidence.fold(0.0, 0, 3.0)
    m2, k2 = evidence.fold(m1, k1, 5.0)
    assert (m1, k1, k2) == (1.5, 1, 2)
    assert m2 == pytest.approx(5 * (1.5 + 1 / 6)) == pytest.approx(3 * 5 / 2 + 5 / 6)


def test_four_flagrant_rollouts_eject_and_three_do_not() -> None:
    m, k = 0.0, 0
    history = []
    for _ in range(4):
        m, k = evidence.fold(m, k, evidence.rollout_e(50.0))
        history.append(evidence.is_ejected(m))
    assert history == [False, False, False, True]


def test_the_process_neither_overflows_nor_stays_at_zero() -> None:
    m, k = 0.0, 0
    for _ in range(1000):
        m, k = evidence.fold(m, k, evidence.rollout_e(1e9))
    assert m == evidence.HIGHEST
    for _ in range(1000):
        m, k = evidence.fold(m, k, evidence.rollout_e(-1e9))
    assert (m, k) == (0, 2000)
    assert evidence.fold(m, k, 1.0)[0] == 1 / (2001 * 2002)


def test_a_profile_survives_json() -> None:
    assert evidence.from_json(evidence.to_json(PROFILE)) == PROFILE
    assert evidence.to_json(PROFILE) == evidence.to_json(evidence.from_json(evidence.to_json(PROFILE)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "unknown field"),
        ({"q0": [0.3]}, "has 2 bins"),
        ({"q0": [0.7, 0.01]}, "q0 <= q1"),
        ({"q0": [0.0, 0.01]}, "0 < q0"),
        ({"q1": {"unseeded": [0.6, 1.0]}}, "q1 < 1"),
        ({"q1": {}}, "length >= 1"),
        ({"edges": [-0.1]}, "must rise and be positive"),
        ({"q0": "0.3"}, "Expected `array`"),
    ],
)
def test_an_unsound_profile_is_refused(change: dict, message: str) -> None:
    document = msgspec.json.decode(evidence.to_json(PROFILE)) | change
    with pytest.raises(msgspec.ValidationError, match=message):
        evidence.from_json(msgspec.json.encode(document))


def test_the_bound_on_a_proportion() -> None:
    """Clopper and Pearson: with no flip in n it is 1 − error^(1/n); the other by the defining equation."""
    assert evidence._upper_bound(0, 1000, 1e-3) == pytest.approx(1 - 1e-3 ** (1 / 1000), rel=1e-4)
    bound = evidence._upper_bound(3, 20, 0.025)
    assert bound == pytest.approx(0.37893, abs=1e-4)
    assert sum(math.comb(20, i) * bound**i * (1 - bound) ** (20 - i) for i in range(4)) == pytest.approx(0.025)
    assert evidence._upper_bound(0, 0, 1e-3) == evidence._upper_bound(5, 5, 1e-3) == 1
    assert 0.5 < evidence._upper_bound(50_000, 100_000, 1e-3) < 0.51


def test_calibration_on_the_same_machine_forgives_others(profile: Profile) -> None:
    """No honest flip above 0.001 was seen; a near-tie may flip all the same, and a wide gap hardly ever."""
    q0 = dict(zip((0.0, *profile.edges), profile.q0, strict=True))
    assert q0[1e-3] > 0.3
    assert q0[0.01] > 0.08
    assert 1e-3 <= q0[2.0] < 0.02
    assert list(profile.q0) == sorted(profile.q0, reverse=True)


def test_calibration_keeps_the_alternatives_above_the_null(profile: Profile) -> None:
    assert list(profile.q1) == ["unseeded", "unseeded x 0.25", "unseeded x 0.0625", "unseeded x 0.015625"]
    assert all(q1 >= q0 for row in profile.q1.values() for q0, q1 in zip(profile.q0, row, strict=True))
    assert profile.honest.tokens == 3000


def test_a_bin_without_cheats_is_silent() -> None:
    near = [(np.full(50, 0.05), np.zeros(50))]
    silent = evidence.calibrate("x", near, {"unseeded": near}, edges=(0.1,))
    assert silent.q1["unseeded"] == silent.q0
    assert evidence.average_log_ratio(silent, Tally((9, 9), (9, 9))) == pytest.approx(0)


@pytest.mark.parametrize(("spread", "tokens"), [(2.0, 10), (4.0, 20), (8.0, 60)])
def test_unseeded_sampling_is_ejected_within_five_audited_rollouts(
    profile: Profile, spread: float, tokens: int
) -> None:
    """Calibrated on a policy that is unsure of itself; at spread 8 two samples of the policy seldom differ."""
    rng = np.random.default_rng(2)
    for _ in range(10):
        m, k = 0.0, 0
        for gap, margin in play(rng, 5, tokens, seeded=False, spread=spread):
            log_lr = evidence.average_log_ratio(profile, evidence.tally(profile.edges, gap, margin))
            m, k = evidence.fold(m, k, evidence.rollout_e(log_lr))
        assert evidence.is_ejected(m)


def test_honest_rollouts_only_ever_speak_for_the_node(profile: Profile) -> None:
    rng = np.random.default_rng(3)
    tallies = [evidence.tally(profile.edges, *sample) for sample in play(rng, 200, 30, seeded=True)]
    assert max(evidence.average_log_ratio(profile, one) for one in tallies) < 0
