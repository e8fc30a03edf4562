"""The anytime bound by simulation with heavy tails, and what must hold of every tally and every record."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import FP32

from farflung.trust import bounds, evidence
from farflung.trust.evidence import CHEATS, Profile, Seen, Tally
from farflung.trust.record import Finding, NodeRecord, TrustSettings, confirm, fold, weigh

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
    """0 or the cap: the worst that fits under it with mean 1."""
    return np.where(rng.random(size) < 1 / evidence.CAP, evidence.CAP, 0.0)


def halves(rng: np.random.Generator, size: int) -> np.ndarray:
    """0 or 2 like a doubling gambler, who comes closest to the bound."""
    return 2.0 * rng.integers(0, 2, size)


def exceedance(draw, *, eta: float, arbitrary: float) -> list[float]:
    """The share of simulated honest keys whose M ever reached each level; a share `arbitrary` is awful."""
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


def test_the_fold_is_the_one_that_is_simulated() -> None:
    rng = np.random.default_rng(SEED)
    ratios = lognormal(rng, 100)
    m, k = np.zeros(1), 0
    for ratio in ratios:
        m, k = evidence.fold(m, k, evidence.e_values(np.log([ratio])))
    e = np.minimum(ratios, evidence.CAP) / (1 + evidence.CAP * evidence.ETA)
    unrolled = sum(np.prod(e[j - 1 :]) / (j * (j + 1)) for j in range(1, 101))
    assert (m[0], k) == (pytest.approx(unrolled), 100)


def test_the_bound_fails_if_bad_submissions_are_folded_first() -> None:
    """Why the order must be fixed beforehand: the same honest e-values, sorted within blocks of a hundred."""
    rng = np.random.default_rng(SEED)
    e = -np.sort(-two_points(rng, PATHS * 100).reshape(PATHS, 100) / 2, axis=1)
    m = e[:, 0] / 2
    assert (m >= evidence.CAP / 4).mean() > 0.05


# --- hypothesis ------------------------------------------------------------------------------------------------------

PROFILE = Profile("three bins", edges=(0.01, 0.5), q0=(0.4, 0.05, 0.002), honest=Tally((1, 1, 1), (0, 0, 0)), **FP32)
positions = st.tuples(
    st.floats(0, 20, width=32), st.floats(0, 20, width=32), st.floats(0, 1, width=32), st.floats(-20, 20, width=32)
)
rollouts = st.lists(positions, max_size=40).map(lambda rows: Seen(*np.array(rows, "f4").reshape(-1, 4).T))
ratios = st.lists(st.floats(-1e6, 1e6), min_size=len(CHEATS), max_size=len(CHEATS)).map(tuple)


@given(rollouts, rollouts)
def test_log_ratios_of_parts_add_up(one: Seen, two: Seen) -> None:
    whole = Seen(*(np.concatenate(pair) for pair in zip(one, two, strict=True)))
    parts = evidence.log_ratios(PROFILE, one) + evidence.log_ratios(PROFILE, two)
    assert evidence.log_ratios(PROFILE, whole) == pytest.approx(parts, abs=1e-6)


@given(rollouts)
def test_the_mean_lies_between_its_alternatives(one: Seen) -> None:
    each = evidence.submission_log_ratios([evidence.log_ratios(PROFILE, one)])
    mean = evidence.mean_log_ratio(each)
    assert each.min() - 1e-9 <= mean <= each.max() + 1e-9
    assert mean >= each.max() - math.log(len(each)) - 1e-9


@given(rollouts, st.integers(0, 39))
def test_one_flip_more_is_never_better_for_the_node(one: Seen, place: int) -> None:
    if place < len(one.margin):
        margin = one.margin.copy()
        one = one._replace(margin=np.where(np.arange(len(margin)) == place, 0.0, margin))
        margin[place] = 1.0
        before, after = (evidence.log_ratios(PROFILE, seen) for seen in (one, one._replace(margin=margin)))
        assert (after >= before - 1e-9).all()


@given(st.lists(rollouts, max_size=5))
def test_a_tally_loses_no_position(seen: list[Seen]) -> None:
    found = bounds.tally(bounds.EDGES, seen)
    assert found.tokens == sum(len(one.gap) for one in seen)
    assert sum(found.flips) == sum(map(evidence.flips, seen))
    assert all(flips <= count for flips, count in zip(found.flips, found.positions, strict=True))


@given(ratios, st.floats(1.01, 1e6), st.floats(0, 1))
def test_one_submission_is_worth_less_than_the_cap(log_lr: tuple[float, ...], cap: float, eta: float) -> None:
    e = evidence.e_values(np.array(log_lr), cap, eta)
    assert ((e >= 0) & (e <= cap * (1 + 1e-12))).all()


audits = st.lists(st.tuples(st.sampled_from([fold, weigh]), st.lists(ratios, min_size=1, max_size=4)), max_size=20)


@given(audits)
def test_a_record_never_forgets(audits: list) -> None:
    record, settings = NodeRecord(), TrustSettings()
    for how, audit in audits:
        if record.status == "quarantined":
            break
        before = record
        record, outcome = how(record, [Finding("r", 9, 3, log_ratios) for log_ratios in audit], settings)
        assert record.audited_rollouts == before.audited_rollouts + len(audit)
        assert record.bad_submissions >= before.bad_submissions
        assert math.isfinite(record.statistic)
        assert (outcome.kind == "quarantine") == (record.status == "quarantined")
        assert how is fold or record.m == before.m


@given(ratios, ratios)
def test_a_second_opinion_counts_in_favour_only(first: tuple[float, ...], second: tuple[float, ...]) -> None:
    record = NodeRecord(m=(1e7,) * len(evidence.ALTERNATIVES), audited_submissions=9)
    suspect, outcome = fold(record, [Finding("r", 9, 3, first)], TrustSettings())
    if outcome.kind == "quarantine":
        after, verdict = confirm(suspect, [Finding("r", 9, 3, second)], TrustSettings())
        assert all(one <= other for one, other in zip(after.m, suspect.m, strict=True))
        assert after.audited_submissions == suspect.audited_submissions
        assert (verdict.kind, after.status) in (("eject", "ejected"), ("release", "probation"))
