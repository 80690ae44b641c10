"""Gaussian mixtures in the space of an embedder, whose covariance is a base plus something of low rank. Pure numpy.

Log densities leave out −d/2 · log 2π, which cancels in every ratio that the router forms.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve, cholesky, solve_triangular
from scipy.special import logsumexp

Array = npt.NDArray[np.float64]


class Base(Protocol):
    """A covariance C that many densities share."""

    @property
    def logdet(self) -> float:
        """log det C."""

    def solve(self, rows: Array) -> Array:
        """C⁻¹ applied to each row: (n, d) → (n, d)."""


class Isotropic:
    """C = variance · I, of `dimension`."""

    def __init__(self, variance: float, dimension: int) -> None:
        self.logdet = dimension * float(np.log(variance))
        self._variance = variance

    def solve(self, rows: Array) -> Array:
        """Rows ÷ variance."""
        return rows / self._variance


class Dense:
    """C = a positive definite matrix (d, d), factorised once."""

    def __init__(self, covariance: Array) -> None:
        self._factor = cho_factor(covariance, lower=True, check_finite=False)
        self.logdet = 2 * float(np.log(np.diag(self._factor[0])).sum())

    def solve(self, rows: Array) -> Array:
        """C⁻¹ rows."""
        solved: Array = cho_solve(self._factor, rows.T, check_finite=False).T
        return solved


class Mixture:
    """Σₖ wₖ N(μₖ, C + FᵀF) with `means` (k, d), `weights` (k,) that sum to 1, and `factor` F (r, d), r may be 0.

    Solved with C alone and a matrix of r × r (Woodbury), so many mixtures over one base cost little each.
    """

    def __init__(self, means: Array, weights: Array, factor: Array, base: Base) -> None:
        solved = base.solve(factor)
        inner = cholesky(np.eye(len(factor)) + solved @ factor.T, lower=True) if len(factor) else np.eye(0)
        # Rows that a prompt is multiplied with: C⁻¹ μ, and the part of C⁻¹ that the factor takes back.
        self._solved_means = base.solve(means)
        self._back = solve_triangular(inner, solved, lower=True) if len(factor) else factor
        self._means_back = means @ self._back.T
        self._offset = (means * self._solved_means).sum(axis=1) - (self._means_back**2).sum(axis=1)
        self._log_weights = np.log(weights)
        self.logdet = base.logdet + 2 * float(np.log(np.diag(inner)).sum())

    def log_density(self, x: Array, solved: Array) -> tuple[Array, npt.NDArray[np.intp]]:
        """Log density of rows `x` (n, d), given `solved` = C⁻¹ x; and the component nearest to each row."""
        back = x @ self._back.T
        own = (x * solved).sum(axis=1) - (back**2).sum(axis=1)
        distances = own[:, None] + self._offset - 2 * (x @ self._solved_means.T - back @ self._means_back.T)
        values = self._log_weights - distances / 2
        return logsumexp(values, axis=1) - self.logdet / 2, distances.argmin(axis=1)
