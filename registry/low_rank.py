"""Sums of low-rank matrices Σ c B A, and the best B A of a matrix at a cut. Pure arithmetic; knows no card.

A sum that is given by its factors is never multiplied out: QR leaves a small core to decompose, in float64. Of a dense
matrix a randomised sketch is enough where it is much thinner (Halko, Martinsson and Tropp 2011, arXiv:0909.4061,
algorithm 4.4); it grows until it meets the bound, and the energy outside it is measured, as that of its residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32] | npt.NDArray[np.float64]

_SKETCH_BELOW: Final = 1 / 4
"""Width of a sketch by the smaller side; above, a whole decomposition costs little more."""
_FIRST_WIDTH: Final = 64
_OVERSAMPLING: Final = 16
_POWER_ITERATIONS: Final = 6
"""Of a spectrum as flat as that of a TIES sum the error is up to 1e-3 of itself above the least; with 4 it is 2e-3."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Term:
    """The matrix factor · B A (d_out, d_in): `a` is (rank, d_in), `b` (d_out, rank)."""

    a: Matrix
    b: Matrix
    factor: float = 1.0

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return int(self.b.shape[0]), int(self.a.shape[1])

    def dense(self) -> npt.NDArray[np.float32]:
        """The matrix multiplied out (d_out, d_in)."""
        return np.asarray(self.factor * self.b @ self.a, dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where a singular value decomposition is cut off; of several bounds the one that keeps fewest counts.

    `rank` keeps at most so many singular values, `energy` the fewest whose squares make that share of all squares,
    `error` the fewest that leave a relative Frobenius error of at most that. With none only rounding is cut off.
    Raises `ValueError`.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"expected a rank of at least 1, got {self.rank}")
        for name, share in (("energy", self.energy), ("error", self.error)):
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"expected {name} above 0 and at most 1, got {share}")

    @property
    def bounds(self) -> dict[str, float]:
        """Those that were given, by name."""
        given = {"rank": self.rank, "energy": self.energy, "error": self.error}
        return {name: value for name, value in given.items() if value is not None}

    def keep(self, tails: npt.NDArray[np.float64]) -> int | None:
        """How many singular values stay, one at least; None where more are needed than there are.

        `tails` (n + 1,) says how much energy is lost at rank 0 (all of it), 1, … n.
        """
        counts = [] if self.rank is None else [min(self.rank, len(tails) - 1)]
        reached = np.flatnonzero(tails <= self._lost() * tails[0])
        counts += [int(index) for index in reached[:1]]
        return max(1, min(counts)) if counts else None

    def _lost(self) -> float:
        """The share of the energy that may be lost."""
        by_energy = 0.0 if self.energy is None else 1 - self.energy
        return max(by_energy, 0.0 if self.error is None else self.error**2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Approximation:
    """A matrix in place of another, and the squared Frobenius norms of what was wanted and of what it misses."""

    term: Term
    wanted: float
    missed: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class _Spectrum:
    """U (d_out, n), S (n,), Vᵀ (n, d_in), and the energy that lies outside them."""

    u: Matrix
    s: Matrix
    vt: Matrix
    outside: float = 0.0

    def tails(self) -> npt.NDArray[np.float64]:
        """The energy lost at each rank from 0 to n; summed from the small end, where differences would cancel."""
        squares = np.append(self.s.astype(np.float64) ** 2, self.outside)
        return np.asarray(np.cumsum(squares[::-1])[::-1])

    def cut_off(self, cut: Cut) -> Approximation:
        """B A at the cut, √S in both, without what is rounding (as NumPy's matrix_rank counts it)."""
        tails = self.tails()
        rounding = self.s[0] * np.finfo(self.s.dtype).eps * max(len(self.u), self.vt.shape[1])
        keep = max(1, min(cut.keep(tails) or 1, int((self.s > rounding).sum())))
        root = np.sqrt(self.s[:keep])
        term = Term(a=root[:, None] * self.vt[:keep], b=self.u[:, :keep] * root)
        return Approximation(term=term, wanted=float(tails[0]), missed=float(tails[keep]))


def concatenate(terms: Sequence[Term]) -> Approximation:
    """Σ c B A exactly: ranks add up, factors go into B."""
    whole = Term(a=np.concatenate([term.a for term in terms]), b=np.hstack([term.factor * term.b for term in terms]))
    return Approximation(term=whole, wanted=squared_norm(whole))


def reduce(terms: Sequence[Term], cut: Cut) -> Approximation:
    """The best approximation of Σ c B A at the cut, from QR of the factors."""
    whole = concatenate(terms).term
    left, left_core = np.linalg.qr(whole.b.astype(np.float64))
    right, right_core = np.linalg.qr(whole.a.T.astype(np.float64))
    u, s, vt = np.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return _Spectrum(u=left @ u, s=s, vt=vt @ right.T).cut_off(cut)


def decompose(matrix: Matrix, cut: Cut) -> Approximation:
    """A finite dense matrix (d_out, d_in) as B A at the cut, computed in its own precision."""
    width = (cut.rank or _FIRST_WIDTH) + _OVERSAMPLING
    while width <= _SKETCH_BELOW * min(matrix.shape):
        found = _sketch(matrix, width)
        if cut.keep(found.tails()) is not None:
            return found.cut_off(cut)
        width *= 2
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return _Spectrum(u=u, s=s, vt=vt).cut_off(cut)


def squared_norm(term: Term) -> float:
    """‖c B A‖² (Frobenius), by way of the Gram matrices of A and B."""
    a, b = term.a.astype(np.float64), term.b.astype(np.float64)
    return max(0.0, term.factor**2 * float(np.sum((b.T @ b) * (a @ a.T))))


def _sketch(matrix: Matrix, width: int) -> _Spectrum:
    """The leading `width` singular values as a seeded random projection finds them."""
    start = np.random.default_rng(0).standard_normal((matrix.shape[1], width), dtype=np.float32)
    q = np.linalg.qr(matrix @ start.astype(matrix.dtype)).Q
    for _ in range(_POWER_ITERATIONS):
        q = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ q).Q).Q
    within = q.T @ matrix
    u, s, vt = np.linalg.svd(within, full_matrices=False)
    residual = matrix - q @ within
    outside = np.sum(np.square(residual, out=residual), dtype=np.float64)
    return _Spectrum(u=q @ u, s=s, vt=vt, outside=float(outside))


__all__ = ["Approximation", "Cut", "Matrix", "Term", "concatenate", "decompose", "reduce", "squared_norm"]
