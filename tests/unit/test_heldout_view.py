"""One evaluation as people see it: worked by hand."""

import pytest

from farflung.config import Config
from farflung.dashboard.formats import curve, curves
from farflung.queries.evals import view


def test_pass_at_k_is_the_mean_over_tasks_with_wilsons_interval() -> None:
    found = view(3, 0.25, 4, [(4, 1), (4, 0)], 2)
    # of the six pairs of four samples three have the one right sample: 1/2; none right: 0
    assert found.pass_k == pytest.approx(0.25)
    # Wilson, 0.25 of 2: centre (0.25 + 3.8415/4) / (1 + 3.8415/2), half 1.96 sqrt(0.1875/2 + 3.8415/16) / 2.9207
    assert (found.pass_k_low, found.pass_k_high) == pytest.approx((0.0267, 0.8021), abs=1e-4)
    assert (found.pass_k_tasks, found.k) == (2, 2)


def test_tasks_with_fewer_samples_than_k_are_left_out() -> None:
    assert view(0, 0.5, 2, [(2, 1)], 4).pass_k is None


def test_k_is_at_most_the_samples() -> None:
    with pytest.raises(ValueError, match="pass@5 cannot be estimated from 4 samples"):
        Config.model_validate({"eval": {"samples": 4, "k": 5}})
    assert Config.model_validate({"eval": {"samples": 0, "k": 5}}).eval.k == 5


def test_the_curve_has_a_band_and_a_second_line() -> None:
    points = curves([], [view(0, 0.2, 50, [(4, 1)] * 9, 2), view(2, 0.6, 50, [], 2)])
    assert [spot[0] for spot in points["heldout"]] == [0, 2]
    assert [spot[:2] for spot in points["passk"]] == [(0, 0.5)]
    drawn = curve(points["heldout"], "held out", 2, points["passk"])
    assert drawn.count("<polygon") == 2
    assert drawn.count("<polyline") == 2
    assert drawn.count("dot also") == 1
