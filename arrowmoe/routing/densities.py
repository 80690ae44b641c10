"""Gaussian mixtures in the space of an embedder, whose covariance is a base plus something of low rank. Pure numpy.

Log densities leave out −d/2 · log 2π, which cancels in every ratio that the router forms.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy.linalg import cholesky, solve_triangular

Array = npt.NDArray[np.float64]


class Base(Protocol):
    """A covariance C that many densities share."""

    @property
    def logdet(self) -> float:
        """log det C."""

    def whiten(self, rows: Array) -> Array:
        """L⁻¹ applied to each row, where C = L Lᵀ: (n, d) → (n, d), in which C is the identity."""


class Isotropic:
    """C = variance · I, of `dimension`."""

    def __init__(self, variance: float, dimension: int) -> None:
        self.logdet = dimension * float(np.log(variance))
        self._deviation = np.sqrt(variance)

    def whiten(self, rows: Array) -> Array:
        """Rows ÷ standard deviation."""
        return np.asarray(rows / self._deviation)


class Dense:
    """C = a positive definite matrix (d, d), factorised once."""

    def __init__(self, covariance: Array) -> None:
        self._factor = cholesky(covariance, lower=True, check_finite=False)
        self.logdet = 2 * float(np.log(np.diag(self._factor)).sum())

    def whiten(self, rows: Array) -> Array:
        """L⁻¹ rows."""
        return solve_triangular(self._factor, rows.T, lower=True, check_finite=False).T


class Mixture:
    """Σₖ wₖ N(μₖ, C + FᵀF) with `means` (k, d), `weights` (k,) that sum to 1, and `factor` F (r, d), r may be 0.

    Solved with C's factor and a matrix of r × r (Woodbury), so many mixtures over one base cost little each.
    """

    def __init__(self, means: Array, weights: Array, factor: Array, base: Base) -> None:
        white = base.whiten(np.concatenate([means, factor]))
        # A copy, for a view would keep the factor's rows in memory too.
        self._means, spread = white[: len(means)].copy(), white[len(means) :]
        inner = cholesky(np.eye(len(factor)) + spread @ spread.T, lower=True, check_finite=False)
        # In whitened space the precision is I − BᵀB.
        self._back = solve_triangular(inner, spread, lower=True, check_finite=False)
        self._means_back = self._means @ self._back.T
        self._offset = (self._means**2).sum(axis=1) - (self._means_back**2).sum(axis=1)
        self._log_weights = np.log(weights)
        self.logdet = base.logdet + 2 * float(np.log(np.diag(inner)).sum())

    def log_density(self, white: Array) -> tuple[Array, npt.NDArray[np.intp]]:
        """Log density of rows (n, d), given as `white` = base.whiten(rows); and the component nearest to each row."""
        back = white @ self._back.T
        own = (white**2).sum(axis=1) - (back**2).sum(axis=1)
        distances = own[:, None] + self._offset - 2 * (white @ self._means.T - back @ self._means_back.T)
        values = self._log_weights - distances / 2
        peak = values.max(axis=1)  # scipy's logsumexp takes as long as all the rest here
        sums = np.log(np.exp(values - peak[:, None]).sum(axis=1))
        return peak + sums - self.logdet / 2, distances.argmin(axis=1)
