"""Intervals: against their formulas and against how often they hold the truth."""

import math

import numpy as np
import pytest

from rnnlab.statistics import bootstrap, columns, t_interval, wilson


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (3, 5), (5, 5), (7, 40)])
def test_wilson_is_its_formula(successes, trials):
    z, p = 1.959963984540054, successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    # a few roundings of numbers around 1; an end that is 0 or 1 comes out of a difference
    assert wilson(successes, trials) == pytest.approx((p, centre - half, centre + half), abs=1e-14)


def test_wilson_of_five_in_five_is_wide():
    assert wilson(5, 5)[1] == pytest.approx(0.5655, abs=5e-5)  # the formula, rounded to four digits


def test_bootstrap_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(1).normal(3, 2, 400)
    mean, low, high = bootstrap(values)
    assert mean == pytest.approx(values.mean(), rel=1e-14)  # one sum in another order
    # percentile ends of 1,000 resamples scatter by some 5 % of the half width
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)


def test_bootstrap_holds_the_median_as_often_as_it_says():
    rng = np.random.default_rng(2)
    held = sum(low <= 0 <= high for _, low, high in (bootstrap(rng.normal(size=25), np.median) for _ in range(200)))
    assert 180 <= held <= 200  # 95 % of 200 is 190, ± three standard deviations of 3.1


def test_bootstrap_of_one_value_has_no_interval():
    value, low, high = bootstrap([2.5])
    assert value == 2.5
    assert math.isnan(low)
    assert math.isnan(high)


def test_columns_are_named_as_plots_take_them():
    assert columns("success", (0.5, 0.2, 0.8)) == {"success": 0.5, "low_success": 0.2, "high_success": 0.8}


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: wilson(1, 0), "trials"),
        (lambda: wilson(6, 5), "successes"),
        (lambda: wilson(1, 5, 1.0), "confidence"),
        (lambda: bootstrap([]), "values"),
        (lambda: bootstrap([1.0, math.nan]), "values"),
        (lambda: bootstrap([1.0, 2.0], confidence=0), "confidence"),
        (lambda: bootstrap([1.0, 2.0], resamples=0), "resamples"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def test_t_interval_is_that_of_student():
    """His own example (1908, sec. IX): additional hours of sleep; 2.262 is t at 9 degrees of freedom."""
    hours = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    half = 2.262157 * 1.789010 / 10**0.5
    np.testing.assert_allclose(t_interval(hours), (0.75, 0.75 - half, 0.75 + half), rtol=1e-6)
    assert np.isnan(t_interval([1.0])[1:]).all()
    with pytest.raises(ValueError, match="at least one finite number"):
        t_interval([1.0, np.inf])
    with pytest.raises(ValueError, match=r"confidence must be a finite number in \(0, 1\), got 5"):
        t_interval([1.0], confidence=5)


def test_t_interval_of_five_holds_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    ends = np.array([t_interval(rng.normal(size=5))[1:] for _ in range(2000)])
    share = ((ends[:, 0] < 0) & (ends[:, 1] > 0)).mean()
    assert share == pytest.approx(0.95, abs=0.015)  # three standard errors of 2,000 draws
