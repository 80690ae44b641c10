"""Paired statistics against scipy's exact test, brute force and their own promises under simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from evolution.paired import least_difference, lift_interval, mcnemar, telling_items, upper_mean


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test_of_the_discordant_pairs(gains: int, losses: int) -> None:
    exact = stats.binomtest(gains, gains + losses, alternative="greater").pvalue if gains + losses else 1.0
    assert mcnemar(gains, losses) == pytest.approx(exact)


@pytest.mark.parametrize(("gains", "losses", "items"), [(9, 3, 40), (0, 0, 25), (4, 4, 30), (30, 0, 30)])
def test_the_interval_is_that_of_resampled_items(gains: int, losses: int, items: int) -> None:
    differences = np.repeat([1, -1, 0], [gains, losses, items - gains - losses])
    rows = np.random.default_rng(5).integers(0, items, (20_000, items))
    expected = np.quantile(differences[rows].mean(axis=1), [0.025, 0.975])
    assert lift_interval(gains, losses, items, draws=20_000, seed=1) == pytest.approx(expected, abs=1.01 / items)


def test_the_interval_is_the_same_for_the_same_seed() -> None:
    first, second = (lift_interval(9, 3, 40, draws=500, seed=7) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("gains", "losses", "items"), [(9, 3, 40), (2, 5, 60), (0, 3, 150), (6, 0, 20), (0, 20, 50)])
def test_the_least_difference_is_where_a_numerical_score_test_is_at_its_level(
    gains: int, losses: int, items: int
) -> None:
    bound = least_difference(gains, losses, items)
    assert -1 < bound < (gains - losses) / items
    lost = _most_likely_lost(gains, losses, items, bound)
    error = math.sqrt(items * (2 * lost + bound - bound**2))
    assert (gains - losses - items * bound) / error == pytest.approx(stats.norm.ppf(0.95), abs=1e-3)


def _most_likely_lost(gains: int, losses: int, items: int, difference: float) -> float:
    """The share of losses that maximises the multinomial likelihood if gains − losses is `difference` in truth."""

    def surprise(lost: float) -> float:
        shares = np.clip([lost + difference, lost, 1 - 2 * lost - difference], 1e-12, 1)
        return -float(np.array([gains, losses, items - gains - losses]) @ np.log(shares))

    ends = (max(0.0, -difference), (1 - difference) / 2)
    return float(optimize.minimize_scalar(surprise, bounds=ends, method="bounded", options={"xatol": 1e-10}).x)


def test_no_change_at_all_still_leaves_room_for_a_fall() -> None:
    z = float(stats.norm.ppf(0.95))
    assert least_difference(0, 0, 40) == pytest.approx(-(z**2) / (40 + z**2), abs=1e-6)
    assert least_difference(0, 0, 0) == -1.0
    assert least_difference(0, 12, 12) == -1.0


@given(st.floats(0.01, 0.5))
def test_so_many_unchanged_items_just_rule_out_a_fall(margin: float) -> None:
    items = telling_items(margin)
    assert least_difference(0, 0, items) > -margin - 1e-9
    assert least_difference(0, 0, items - 1) <= -margin + 1e-6


@pytest.mark.parametrize(("gain", "loss"), [(0.02, 0.07), (0.0, 0.05), (0.1, 0.15)])
def test_a_fall_by_the_margin_is_let_through_about_once_in_twenty(gain: float, loss: float) -> None:
    items, margin = 150, 0.05
    drawn = np.random.default_rng(2).multinomial(items, [gain, loss, 1 - gain - loss], size=20_000)
    counts, weights = np.unique(drawn[:, :2], axis=0, return_counts=True)
    passed = [least_difference(int(gains), int(losses), items) > -margin for gains, losses in counts]
    assert float(weights[passed].sum() / weights.sum()) <= 0.065


def test_the_upper_mean_is_the_end_of_scipys_interval() -> None:
    values = np.array([0.1, -0.2, 0.05, 0.3, 0.0])
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(0.90)
    assert upper_mean(values) == pytest.approx(interval.high)
    assert upper_mean(np.zeros(4)) == 0.0
    for unknown in (np.zeros(0), np.ones(1), np.array([0.0, math.inf]), np.array([0.0, math.nan])):
        assert upper_mean(unknown) == math.inf


def test_more_losses_never_raise_the_least_difference() -> None:
    bounds = [least_difference(3, losses, 50) for losses in range(30)]
    assert all(after < before for before, after in itertools.pairwise(bounds))
