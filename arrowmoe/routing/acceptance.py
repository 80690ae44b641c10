"""Does a prompt belong to one card at all: its fit, in nats, and the p-value of that fit.

    fit(x) = log p(x | card) − log ½ (p(x | card's whole) + p(x | probe)), both Gaussian: a relative Mahalanobis
    distance (Ren et al. 2021, arXiv:2106.09022), in which the whole is one Gaussian with the half-and-half's moments

Only the card's own statistics and the shared probe go in, never another card, so p-values made with the card hold
wherever it travels and whoever else is there. A p-value is conformal (Vovk et al. 2005): of prompts that are
exchangeable with the card's calibration prompts, a share of at most α (+ 1 / (n + 1)) has p < α.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from arrowmoe.features import Vectors
from arrowmoe.routing.densities import Array, Isotropic, Mixture
from arrowmoe.routing.probe import Probe
from arrowmoe.routing.statistics import CardStatistics, calibrated, summarise

VARIANCE = 1.5
"""Floor under every direction's variance, in units of 1 / d, for a card with many prompts."""
FEW_PROMPTS = 500
"""A card with n prompts has FEW_PROMPTS / n instead where that is more, up to 8 × the floor."""
FOLDS = 5
CALIBRATION_VALUES = 256
LEAST_CALIBRATION = 8


class Acceptance:
    """The fit of prompts to one card; its floor is that of a card of `count` prompts, None: as many as it has."""

    def __init__(self, statistics: CardStatistics, probe: Probe, *, count: float | None = None) -> None:
        self._statistics = statistics
        variance = _variance(statistics.count if count is None else count) / statistics.dimension
        self._own = Isotropic(variance, statistics.dimension)
        self._card = Mixture(statistics.prototypes, statistics.weights, statistics.sketch, self._own)
        apart = statistics.mean - probe.mean
        factor = np.concatenate(
            [np.sqrt(0.5) * statistics.sketch, np.sqrt(0.5) * statistics.between(), apart[None] / 2]
        )
        self._rest = probe.half(2 * variance)
        self._whole = Mixture((statistics.mean + probe.mean)[None] / 2, np.ones(1), factor, self._rest)

    def fit(self, x: Array) -> Array:
        """Rows (n, d) → fits (n,) in nats."""
        inside, _ = self._card.log_density(self._own.whiten(x))
        outside, _ = self._whole.log_density(self._rest.whiten(x))
        return inside - outside

    def p_values(self, x: Array) -> Array | None:
        """Rows (n, d) → p-values (n,), or None for a card without calibration."""
        values, prompts = self._statistics.calibration, self._statistics.calibrated
        if not prompts:
            return None
        return conformal(self.fit(x), values, prompts)


def conformal(fits: Array, calibration: Array, prompts: int) -> Array:
    """(1 + #{calibration fits ≤ fit}) / (prompts + 1), interpolated where `calibration` (q,) holds quantiles only."""
    if prompts == len(calibration):
        below = np.searchsorted(calibration, fits, side="right").astype(np.float64)
    else:
        below = prompts * np.interp(fits, calibration, np.linspace(0, 1, len(calibration)), left=0.0)
    return (1 + below) / (prompts + 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompts:
    """What describes a card: `vectors` (n, d) of prompts, finer `labels` if there are, and texts that are public.

    `held_out` (m, d) calibrate; without them the prompts themselves do, by cross-fitting.
    """

    vectors: Vectors
    labels: Sequence[str | None] | None = None
    public: Vectors | None = None
    held_out: Vectors | None = None


def describe(prompts: Prompts, probe: Probe, *, min_prompts: int, budget_bytes: int, seed: int = 0) -> CardStatistics:
    """Calibrated statistics of a card; with fewer than 8 prompts to calibrate on they have no p-values."""

    def summary(rows: Array | slice) -> CardStatistics:
        labels = None if prompts.labels is None else [*np.array(prompts.labels, dtype=object)[rows]]
        return summarise(
            prompts.vectors[rows],
            embedder=probe.embedder,
            probe=probe.digest,
            check=probe.check,
            labels=labels,
            public=prompts.public,
            min_prompts=min_prompts,
            budget_bytes=budget_bytes,
            calibration_values=CALIBRATION_VALUES,
        )

    found = summary(slice(None))
    if prompts.held_out is not None and len(prompts.held_out):
        fits = Acceptance(found, probe).fit(prompts.held_out.astype(np.float64))
    elif len(prompts.vectors) >= max(LEAST_CALIBRATION, 2 * min_prompts):
        folds = _folds(len(prompts.vectors), min_prompts, seed)
        fits = np.concatenate(
            [
                Acceptance(summary(folds != fold), probe, count=found.count).fit(
                    prompts.vectors[folds == fold].astype(np.float64)
                )
                for fold in range(folds.max() + 1)
            ]
        )
    else:
        fits = np.zeros(0)
    return calibrated(found, fits, CALIBRATION_VALUES) if len(fits) >= LEAST_CALIBRATION else found


def _folds(rows: int, min_prompts: int, seed: int) -> Array:
    """A fold for each row; with few rows as many folds as rows (leave one out)."""
    number = rows if rows <= 64 and rows - 1 >= min_prompts else FOLDS
    return np.asarray(np.random.default_rng(seed).permutation(np.arange(rows) % number))


def _variance(count: float) -> float:
    """The floor for a card of so many prompts, in units of 1 / d, rounded to VARIANCE · 2ⁿ so that few differ."""
    steps = np.ceil(np.log2(FEW_PROMPTS / count / VARIANCE))
    return VARIANCE * 2.0 ** int(np.clip(steps, 0, 3))


__all__ = ["Acceptance", "Prompts", "conformal", "describe"]
