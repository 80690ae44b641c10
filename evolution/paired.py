"""Statistics of two ways to answer the same items, from the numbers of gains (only the new way is right) and losses."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from scipy import optimize, stats

from evolution.protocols import Floats

CONFIDENCE: Final = 0.95
Z: Final = float(stats.norm.ppf(CONFIDENCE))


def mcnemar(gains: int, losses: int) -> float:
    """P(at least so many gains | gains + losses, each as likely): McNemar's test (1947), exact and one-sided."""
    return float(stats.binom.sf(gains - 1, gains + losses, 0.5))


def lift_interval(gains: int, losses: int, items: int, *, draws: int, seed: int) -> tuple[float, float]:
    """The lift's 95 % interval by a paired percentile bootstrap (Efron 1979).

    Items drawn with replacement have gains, losses and ties from a multinomial, which is drawn instead.
    """
    if items == 0:
        return -1.0, 1.0
    shares = np.array([gains, losses, items - gains - losses]) / items
    drawn = np.random.default_rng(seed).multinomial(items, shares, size=draws)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / items, [0.025, 0.975])
    return float(low), float(high)


def least_difference(gains: int, losses: int, items: int) -> float:
    """Lower 95 % bound of the paired difference (gains − losses) / items by its score test (Tango 1998, eq. 8 and 11).

    Unlike a bootstrap's it is below zero where no answer has changed: −z² / (n + z²).
    """
    if losses == items:
        return -1.0
    found = (gains - losses) / items
    bound = optimize.brentq(lambda d: _excess(gains, losses, items, d), -1.0, found - 1e-9)
    return float(bound)


def telling_items(margin: float) -> int:
    """The fewest items of which none changes that rule out a fall by `margin` (in (0, 1)) with `least_difference`."""
    return math.floor(Z**2 * (1 - margin) / margin) + 1


def upper_mean(values: Floats) -> float:
    """Upper 95 % bound of the mean by Student's t; infinite for fewer than two values or one that is not finite."""
    n = len(values)
    if n < 2 or not np.isfinite(values).all():
        return math.inf
    return float(values.mean() + stats.t.ppf(CONFIDENCE, n - 1) * values.std(ddof=1) / math.sqrt(n))


def _excess(gains: int, losses: int, items: int, difference: float) -> float:
    """Observed minus assumed difference, less z standard errors under the assumption; times `items`."""
    b = -gains - losses + (2 * items - gains + losses) * difference
    c = -losses * difference * (1 - difference)
    lost = (math.sqrt(b * b - 8 * items * c) - b) / (4 * items)
    variance = items * (2 * lost + difference * (1 - difference))
    return gains - losses - items * difference - Z * math.sqrt(max(0.0, variance))


__all__ = ["least_difference", "lift_interval", "mcnemar", "telling_items", "upper_mean"]
