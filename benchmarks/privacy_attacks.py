"""What a reader of a card's statistics can try, in numpy. Each score is higher for what the attack takes for a member.

The reader has the statistics as another node gets them, the probe, and the embedder. None of this inverts vectors into
words with a trained model (Morris et al. 2023, arXiv:2310.06816): texts come from a list that the reader has.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from arrowmoe.routing.acceptance import Acceptance
from arrowmoe.routing.densities import Array
from arrowmoe.routing.probe import Probe
from arrowmoe.routing.statistics import CardStatistics

NEAREST = 300
"""Candidates that a prototype is unmixed into; fewer than the dimension, so the answer is unique."""


def distances(x: Array, points: Array) -> Array:
    """Squared distances (n, k) of rows (n, d) to points (k, d)."""
    squares = (x**2).sum(axis=1)[:, None] + (points**2).sum(axis=1) - 2 * x @ points.T
    return np.asarray(np.maximum(squares, 0.0))


def nearness(statistics: CardStatistics, x: Array) -> Array:
    """(n,): minus the squared distance to the nearest prototype."""
    return np.asarray(-distances(x, statistics.prototypes).min(axis=1))


def fit(statistics: CardStatistics, probe: Probe, x: Array) -> Array:
    """(n,): how well rows fit the card's density, by everything it says but the calibration."""
    return Acceptance(statistics, probe).fit(x)


def inside_sketch(statistics: CardStatistics, x: Array) -> Array:
    """(n,): minus the squared distance to the nearest prototype that the sketch's directions do not explain.

    A sketch with a direction for every prompt explains all of each of them, and of nothing else.
    """
    if not len(statistics.sketch):
        return nearness(statistics, x)
    axes = statistics.sketch / np.linalg.norm(statistics.sketch, axis=1, keepdims=True)

    def outside(rows: Array) -> Array:
        return np.asarray(rows - rows @ axes.T @ axes)

    return np.asarray(-distances(outside(x), outside(statistics.prototypes)).min(axis=1))


def calibration_match(statistics: CardStatistics, probe: Probe, x: Array) -> Array:
    """(n,): minus the distance in nats of a row's fit from the nearest calibration score."""
    return np.asarray(-np.abs(fit(statistics, probe, x)[:, None] - statistics.calibration).min(axis=1))


def unmixed(prototype: Array, count: float, candidates: Array) -> npt.NDArray[np.intp]:
    """Rows of `candidates` (n, d) that `prototype` (d,) seems to be the mean of: non-negative least squares.

    A prompt behind it has the weight 1 / count; what gets half of that is named.
    """
    nearest = np.argsort(distances(candidates, prototype[None])[:, 0])[:NEAREST]
    weights, _ = nnls(candidates[nearest].T, prototype)
    return np.asarray(nearest[weights > 0.5 / count], dtype=np.intp)


def added_prompts(before: CardStatistics, after: CardStatistics) -> Array:
    """(d,): sum of the prompts that came between two versions of one card."""
    return after.count * after.mean - before.count * before.mean


def token_f1(one: str, other: str) -> float:
    """Overlap of two texts' words: harmonic mean of precision and recall, words counted as often as they stand."""
    mine, theirs = Counter(one.lower().split()), Counter(other.lower().split())
    shared = sum((mine & theirs).values())
    return 2 * shared / max(sum(mine.values()) + sum(theirs.values()), 1)
