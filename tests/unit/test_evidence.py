"""Likelihood ratios of replays, the process per key, profiles and their calibration."""

import math

import msgspec
import numpy as np
import pytest
from tests.conftest import CPU, FP32

from farflung.trust import bounds, evidence
from farflung.trust.evidence import ALTERNATIVES, CHEATS, Profile, Seen, Tally
from farflung.trust.record import WHOLE, TrustSettings

PROFILE = Profile("two bins", edges=(0.1,), q0=(0.3, 0.01), honest=Tally((100, 1000), (20, 0)), **FP32)
ROUNDING = 1e-4
"""Noise of the scores in nats."""
UNSEEDED = list(CHEATS).index("other noise at 1 of tokens")
SHIFTED = list(CHEATS).index("scores shifted by 0.3")


def arrays(gap: list[float], margin: list[float], pick: list[float], lead: list[float] | None = None) -> Seen:
    return Seen(*(np.array(part, "f4") for part in (gap, margin, pick, [-9.0] * len(gap) if lead is None else lead)))


def play(rng: np.random.Generator, rollouts: int, tokens: int, *, seeded: bool, spread: float = 2.0) -> list[Seen]:
    """What a replay sees of a policy over 32 tokens; a higher spread of logits makes it surer of itself."""
    shape = (rollouts, tokens, 32)
    logits, noise = rng.normal(0, spread, shape), rng.gumbel(size=shape)
    own = noise if seeded else rng.gumbel(size=shape)
    sent = (logits + own + rng.normal(0, ROUNDING, shape)).argmax(-1)
    scores = logits + noise
    best, order = np.sort(scores, axis=-1), np.argsort(scores, axis=-1)
    margin = best[..., -1] - np.take_along_axis(scores, sent[..., None], -1)[..., 0]
    chance = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    pick = np.take_along_axis(chance, scores.argmax(-1)[..., None], -1)[..., 0]
    first, second = (np.take_along_axis(logits, order[..., [place]], -1)[..., 0] for place in (-1, -2))
    return [Seen(*parts) for parts in zip(best[..., -1] - best[..., -2], margin, pick, second - first, strict=True)]


def total(profile: Profile, rollouts: list[Seen]) -> np.ndarray:
    return evidence.submission_log_ratios([evidence.log_ratios(profile, one) for one in rollouts])


@pytest.fixture(scope="module")
def profile() -> Profile:
    rng = np.random.default_rng(1)
    return bounds.calibrate("simulated", play(rng, 400, 30, seeded=True), noise=rng.normal(0, ROUNDING, 12_000), **CPU)


def test_the_ratio_by_hand() -> None:
    seen = arrays([0.05, 0.05, 0.5, 0.1], [0.05, 0, 0.5, 1e-6], [0.4, 0.3, 0.5, 0.75])
    far, none = PROFILE.q_far, [0.7 - PROFILE.q_far, 0.99 - PROFILE.q_far]
    by_hand = [
        0.3 / 0.3,
        (1 - 0.35 - 0.35) / none[0],
        0.25 / 0.01,
        (1 - 0.125 - 0.125) / none[1],
    ]  # half near, half far
    assert evidence.log_ratios(PROFILE, seen)[UNSEEDED] == pytest.approx(sum(map(math.log, by_hand)), abs=1e-6)
    flips = [0.5 * math.exp(-gap / 0.3) for gap in (0.05, 0.05, 0.5, 0.1)]
    share = math.exp(-PROFILE.far / 0.3)
    near = [max(q0, p * (1 - share)) for q0, p in zip((0.3, 0.3, 0.01, 0.01), flips, strict=True)]
    away = [p * share for p in flips]
    terms = [near[0] / 0.3, (1 - near[1] - away[1]) / none[0], near[2] / 0.01, (1 - near[3] - away[3]) / none[1]]
    assert evidence.log_ratios(PROFILE, seen)[SHIFTED] == pytest.approx(sum(map(math.log, terms)), abs=1e-6)
    assert evidence.flips(seen) == 2
    assert far == 1e-6


def test_a_far_flip_weighs_however_sure_the_policy_was() -> None:
    """One token in twenty replaced where the policy was certain of another: a near flip's evidence would be nil."""
    sure = arrays([22.0] * 20, [22.0] + [0.0] * 19, [1.0] * 20)
    assert evidence.mean_log_ratio(evidence.log_ratios(PROFILE, sure)) > math.log(100)
    honest = arrays([22.0] * 20, [0.0] * 20, [1.0] * 20)
    assert evidence.mean_log_ratio(evidence.log_ratios(PROFILE, honest)) < 0


def test_far_begins_well_above_what_honest_machines_show() -> None:
    def calibrated(margin: float) -> float:
        return bounds.calibrate("p", [arrays([0.1, 5.0], [margin, 0.0], [0.5, 0.5])], noise=noise, **CPU).far

    noise: list[float] = []
    assert (calibrated(0.0), calibrated(0.2), calibrated(0.5)) == (1.0, 1.0, pytest.approx(2.0))
    noise = [0.0, -0.3]
    assert calibrated(0.0) == pytest.approx(2.4), "two tokens may each be off by so much"


def test_a_share_of_the_rollouts() -> None:
    """Cheating on one rollout in eight: each rollout is honest with 7/8 and a cheat's with 1/8."""
    ratios = [np.full(len(CHEATS), 8.0), np.full(len(CHEATS), -3.0)]
    found = dict(zip(ALTERNATIVES, evidence.submission_log_ratios(ratios), strict=True))
    for (_, share), value in found.items():
        by_hand = sum(math.log(1 - share + share * math.exp(x)) for x in (8.0, -3.0))
        assert value == pytest.approx(by_hand)


def test_no_tokens_and_no_rollouts_say_nothing() -> None:
    assert not evidence.log_ratios(PROFILE, arrays([], [], [])).any()
    assert not evidence.submission_log_ratios([]).any()


@pytest.mark.parametrize(
    "odd",
    [
        arrays([0.1], [math.nan], [0.5]),
        arrays([math.inf], [0.1], [0.5]),
        arrays([0.1], [0.1, 0.2], [0.5]),
        arrays([-0.1], [0.1], [0.5]),
        arrays([0.1], [0.1], [1.5]),
        arrays([0.1], [0.1], [-0.5]),
    ],
)
def test_numbers_that_no_replay_gives_fail_closed(odd: Seen) -> None:
    with pytest.raises(ValueError, match=r"gap|margin|pick"):
        evidence.log_ratios(PROFILE, odd)


def test_a_factor_has_mean_one_at_q0_and_less_below() -> None:
    for q0, q1 in ((0.3, 0.6), (0.01, 0.5), (0.01, 0.01)):
        means = [p * q1 / q0 + (1 - p) * (1 - q1) / (1 - q0) for p in (0, q0 / 2, q0)]
        assert means == sorted(means)
        assert means[-1] == pytest.approx(1)


def test_one_submission_is_capped() -> None:
    ratios = np.array([0.0, 1e6, math.log(1000), -1e6])
    assert evidence.e_values(ratios, cap=1000, eta=1e-3) == pytest.approx(np.array([1, 1000, 1000, 0]) / 2)
    assert evidence.is_bad(math.log(evidence.CAP))
    assert not evidence.is_bad(math.log(evidence.CAP) - 0.01)


def test_the_process_by_hand() -> None:
    m1, k1 = evidence.fold(np.zeros(2), 0, np.array([3.0, 1.0]))
    m2, k2 = evidence.fold(m1, k1, np.array([5.0, 0.0]))
    assert (m1.tolist(), k1, k2) == ([1.5, 0.5], 1, 2)
    assert m2 == pytest.approx([5 * (1.5 + 1 / 6), 0])


def test_three_flagrant_submissions_eject_and_two_do_not() -> None:
    m, k, history = np.zeros(len(ALTERNATIVES)), 0, []
    flagrant = np.where(np.arange(len(ALTERNATIVES)) < 1, 50.0, -50.0)  # one alternative alone is there
    for _ in range(3):
        m, k = evidence.fold(m, k, evidence.e_values(flagrant))
        history.append(WHOLE * float(m.mean()) >= evidence.limit())
    assert history == [False, False, True]


def test_what_all_tests_that_may_eject_allow_for_is_alpha() -> None:
    for alpha in (1e-6, 1e-3, 0.05):
        settings = TrustSettings(false_ejection_probability=alpha)
        assert 1 / settings.limit + 1 / settings.serving_limit == pytest.approx(alpha)


def test_the_process_neither_overflows_nor_stays_at_zero() -> None:
    m, k = np.zeros(1), 0
    for _ in range(1000):
        m, k = evidence.fold(m, k, evidence.e_values(np.array([1e9])))
    assert m == evidence.HIGHEST
    for _ in range(1000):
        m, k = evidence.fold(m, k, evidence.e_values(np.array([-1e9])))
    assert (m, k) == (0, 2000)
    assert evidence.fold(m, k, np.ones(1))[0] == 1 / (2001 * 2002)


def test_a_profile_survives_json() -> None:
    assert evidence.from_json(evidence.to_json(PROFILE)) == PROFILE
    assert evidence.to_json(PROFILE) == evidence.to_json(evidence.from_json(evidence.to_json(PROFILE)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "unknown field"),
        ({"q0": [0.3]}, "has 2 bins"),
        ({"q0": [0.99, 0.01]}, "q0 <= 0.95"),
        ({"q0": [0.0, 0.01]}, "0 < q0"),
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
    assert bounds.upper_bound(0, 1000, 1e-3) == pytest.approx(1 - 1e-3 ** (1 / 1000), rel=1e-4)
    bound = bounds.upper_bound(3, 20, 0.025)
    assert bound == pytest.approx(0.37893, abs=1e-4)
    assert sum(math.comb(20, i) * bound**i * (1 - bound) ** (20 - i) for i in range(4)) == pytest.approx(0.025)
    assert bounds.upper_bound(0, 0, 1e-3) == bounds.upper_bound(5, 5, 1e-3) == 1
    assert 0.5 < bounds.upper_bound(50_000, 100_000, 1e-3) < 0.51


def test_calibration_on_the_same_machine_forgives_others(profile: Profile) -> None:
    """No honest flip above 0.001 was seen; a near-tie may flip all the same, and a wide gap hardly ever."""
    at = {gap: profile.q0[int(np.searchsorted(profile.edges, gap, side="right"))] for gap in (1e-3, 0.01, 2.0)}
    assert at[1e-3] > 0.3
    assert at[0.01] > 0.08
    assert 1e-4 <= at[2.0] < 2e-3
    assert list(profile.q0) == sorted(profile.q0, reverse=True)
    assert profile.honest.tokens == 12_000


def test_power_is_measured_on_the_cheats_that_are_given() -> None:
    rng = np.random.default_rng(4)
    cheats = {"unseeded": play(rng, 20, 30, seeded=False), "none": play(rng, 20, 30, seeded=True)}
    found = bounds.calibrate("x", play(rng, 400, 30, seeded=True), cheats, noise=rng.normal(0, ROUNDING, 12_000), **CPU)
    assert found.power["unseeded"] > 1
    assert found.power["none"] == 0


@pytest.mark.parametrize(("spread", "tokens"), [(2.0, 10), (4.0, 20), (8.0, 60)])
def test_unseeded_sampling_is_ejected_within_three_submissions(profile: Profile, spread: float, tokens: int) -> None:
    """Calibrated on a policy that is unsure of itself; at spread 8 two samples of the policy seldom differ."""
    rng = np.random.default_rng(2)
    for _ in range(10):
        m, k = np.zeros(len(ALTERNATIVES)), 0
        for _ in range(3):
            ratios = total(profile, play(rng, 16, tokens, seeded=False, spread=spread))
            m, k = evidence.fold(m, k, evidence.e_values(ratios))
        assert float(m.mean()) >= evidence.limit()


def test_honest_submissions_only_ever_speak_for_the_node(profile: Profile) -> None:
    rng = np.random.default_rng(3)
    for _ in range(40):
        assert evidence.mean_log_ratio(total(profile, play(rng, 8, 30, seeded=True))) < 0


def test_every_alternative_has_words() -> None:
    assert len({evidence.describe(index) for index in range(len(ALTERNATIVES))}) == len(ALTERNATIVES) == 26


# --- temperature -----------------------------------------------------------------------------------------------------


def tempered(rng: np.random.Generator, factor: float, *, noise: float, tokens: int = 4000) -> Seen:
    """A replay of what somebody sampled under the leased noise at `factor` times the temperature."""
    shape = (tokens, 32)
    logits, gumbel = rng.normal(0, 2.0, shape), rng.gumbel(size=shape)
    scores = logits + gumbel
    sent = (logits / factor + gumbel + rng.normal(0, noise, shape)).argmax(-1)
    order = np.argsort(scores, axis=-1)
    rows = np.arange(tokens)
    first, second = order[:, -1], order[:, -2]
    chance = np.exp(logits[rows, first]) / np.exp(logits).sum(-1)
    gap, margin = scores[rows, first] - scores[rows, second], scores[rows, first] - scores[rows, sent]
    return Seen(gap, margin, chance, logits[rows, second] - logits[rows, first])


@pytest.mark.parametrize(("factor", "name"), [(0.9, "0.9 times the temperature"), (1.1, "1.1 times the temperature")])
def test_another_temperature_is_told_from_noise_of_its_size(factor: float, name: str) -> None:
    """Noise of a tenth of a nat flips as many tokens; only a temperature flips just those that it must."""
    rng = np.random.default_rng(5)
    honest = [tempered(rng, 1.0, noise=0.1)]
    profile = bounds.calibrate("noisy", honest, noise=rng.normal(0, 0.1, 4000), tolerance=2e-3, margin=1.0, **CPU)
    weighs = dict(zip(CHEATS, evidence.log_ratios(profile, tempered(rng, factor, noise=0.1)), strict=True))
    assert max(weighs, key=lambda cheat: weighs[cheat]) == name
    assert weighs[name] > math.log(1e6)
    assert max(evidence.log_ratios(profile, tempered(rng, 1.0, noise=0.1))) < math.log(evidence.ODD)
