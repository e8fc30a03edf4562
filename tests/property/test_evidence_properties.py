"""The anytime bound by simulation with heavy tails, and what must hold of every tally and every record."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farflung.trust import evidence
from farflung.trust.evidence import Profile, Tally
from farflung.trust.record import Finding, NodeRecord, TrustSettings, fold

SEED = 20261123
PATHS, AUDITS = 5_000, 400
LEVELS = (2.0, 5.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


def lognormal(rng: np.random.Generator, size: int) -> np.ndarray:
    """Likelihood ratios with mean 1 and a standard deviation of e^4.5."""
    return np.exp(rng.normal(-4.5, 3.0, size))


def pareto(rng: np.random.Generator, size: int) -> np.ndarray:
    """Mean 1 and no variance: tail exponent 1.1."""
    return (1 - rng.random(size)) ** (-1 / 1.1) * (0.1 / 1.1)


def two_points(rng: np.random.Generator, size: int) -> np.ndarray:
    """0 or 100: the worst that fits under the cap with mean 1."""
    return np.where(rng.random(size) < 0.01, 100.0, 0.0)


def halves(rng: np.random.Generator, size: int) -> np.ndarray:
    """0 or 2 like a doubling gambler, who comes closest to the bound."""
    return 2.0 * rng.integers(0, 2, size)


def exceedance(draw, *, eta: float, arbitrary: float) -> list[float]:
    """The share of simulated honest keys whose M ever reached each level; a share `arbitrary` of rollouts is awful."""
    rng = np.random.default_rng(SEED)
    m, highest = np.zeros(PATHS), np.zeros(PATHS)
    for k in range(1, AUDITS + 1):
        ratios = np.where(rng.random(PATHS) < arbitrary, np.inf, draw(rng, PATHS))
        e = np.minimum(ratios, evidence.CAP) / (1 + evidence.CAP * eta)
        m = e * (m + 1 / (k * (k + 1)))
        highest = np.maximum(highest, m)
    return [float((highest >= level).mean()) for level in LEVELS]


@pytest.mark.parametrize("draw", [lognormal, pareto, two_points, halves])
@pytest.mark.parametrize(("eta", "arbitrary"), [(0.0, 0.0), (evidence.ETA, 0.0), (evidence.ETA, evidence.ETA)])
def test_an_honest_key_ever_reaches_x_with_probability_one_in_x(draw, eta: float, arbitrary: float) -> None:
    shares = exceedance(draw, eta=eta, arbitrary=arbitrary)
    print(f"seed={SEED} {draw.__name__} eta={eta} arbitrary={arbitrary}", dict(zip(LEVELS, shares, strict=True)))
    for level, share in zip(LEVELS, shares, strict=True):
        assert share <= 1 / level + 4 * math.sqrt(1 / level / PATHS)


def test_the_scalar_fold_is_the_one_that_is_simulated() -> None:
    rng = np.random.default_rng(SEED)
    ratios = lognormal(rng, 100)
    m, k = 0.0, 0
    for ratio in ratios:
        m, k = evidence.fold(m, k, evidence.rollout_e(math.log(ratio)))
    e = np.minimum(ratios, 100) / 1.1
    unrolled = sum(np.prod(e[j - 1 :]) / (j * (j + 1)) for j in range(1, 101))
    assert (m, k) == (pytest.approx(unrolled), 100)


def test_the_bound_fails_if_bad_rollouts_are_folded_first() -> None:
    """Why the order must be fixed beforehand: the same honest e-values, sorted within blocks of a hundred."""
    rng = np.random.default_rng(SEED)
    e = -np.sort(-two_points(rng, PATHS * 100).reshape(PATHS, 100) / 1.1, axis=1)
    m = e[:, 0] / 2
    assert (m >= 40).mean() > 0.6


# --- hypothesis ------------------------------------------------------------------------------------------------------

PROFILE = Profile(
    "three bins",
    edges=(0.01, 0.5),
    q0=(0.4, 0.05, 0.002),
    q1={"unseeded": (0.7, 0.7, 0.6), "unseeded x 0.1": (0.43, 0.115, 0.0618)},
    honest=Tally((1, 1, 1), (0, 0, 0)),
)
positions = st.tuples(*[st.integers(0, 50)] * 3)
ratios = st.floats(-1e6, 1e6)


@st.composite
def tallies(draw) -> Tally:
    counts = draw(positions)
    return Tally(counts, tuple(draw(st.integers(0, count)) for count in counts))


@given(tallies(), tallies())
def test_log_ratios_of_parts_add_up(one: Tally, two: Tally) -> None:
    whole = Tally(
        tuple(a + b for a, b in zip(one.positions, two.positions, strict=True)),
        tuple(a + b for a, b in zip(one.flips, two.flips, strict=True)),
    )
    parts = evidence.log_ratio(PROFILE, one, "unseeded") + evidence.log_ratio(PROFILE, two, "unseeded")
    assert evidence.log_ratio(PROFILE, whole, "unseeded") == pytest.approx(parts, abs=1e-9)


@given(tallies())
def test_the_mean_lies_between_its_alternatives(one: Tally) -> None:
    each = [evidence.log_ratio(PROFILE, one, alternative) for alternative in PROFILE.q1]
    mean = evidence.average_log_ratio(PROFILE, one)
    assert min(each) - 1e-9 <= mean <= max(each) + 1e-9
    assert mean >= max(each) - math.log(len(each)) - 1e-9


@given(tallies(), st.integers(0, 2))
def test_one_flip_more_is_never_better_for_the_node(one: Tally, bin: int) -> None:
    if one.flips[bin] < one.positions[bin]:
        flips = tuple(count + (index == bin) for index, count in enumerate(one.flips))
        worse = Tally(one.positions, flips)
        assert evidence.average_log_ratio(PROFILE, worse) >= evidence.average_log_ratio(PROFILE, one)


@given(st.lists(st.tuples(st.floats(0, 20, width=32), st.floats(0, 20, width=32)), max_size=40))
def test_a_tally_loses_no_position(pairs: list[tuple[float, float]]) -> None:
    gap, margin = np.array(pairs, "f4").reshape(-1, 2).T
    found = evidence.tally(evidence.EDGES, gap, margin)
    assert found.tokens == len(pairs)
    assert sum(found.flips) == int((margin > evidence.TIE).sum())
    assert all(flips <= count for flips, count in zip(found.flips, found.positions, strict=True))


@given(ratios, st.floats(1.01, 1e6), st.floats(0, 1))
def test_one_rollout_is_worth_less_than_the_cap(log_lr: float, cap: float, eta: float) -> None:
    assert 0 <= evidence.rollout_e(log_lr, cap, eta) <= cap * (1 + 1e-12)


@given(st.lists(st.lists(ratios, max_size=5), max_size=30))
def test_a_record_never_forgets(audits: list[list[float]]) -> None:
    record, settings = NodeRecord(), TrustSettings()
    for audit in audits:
        before = record
        record, outcome = fold(record, [Finding("r", 9, 3, log_lr) for log_lr in audit], settings)
        assert record.audited_rollouts >= before.audited_rollouts
        assert record.bad_rollouts >= before.bad_rollouts
        assert math.isfinite(record.m)
        assert (outcome.kind == "eject") == (record.status == "ejected" != before.status)
        assert before.status != "ejected" or record == before
