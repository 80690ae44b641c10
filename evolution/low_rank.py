"""A matrix as a product of two thin ones, B A: its singular value decomposition, cut where a bound says.

Small matrices are decomposed exactly. Of a large one a randomised sketch is enough (Halko, Martinsson and Tropp 2011,
arXiv:0909.4061, algorithm 4.4), which grows until it meets the bound. What is cut off is measured, never guessed: the
energy outside the sketch is that of its residual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

EXACT_UP_TO: Final = 1024
"""The smaller side of the largest matrix whose whole decomposition is computed at once."""
_FIRST_WIDTH: Final = 64
_OVERSAMPLING: Final = 16
_POWER_ITERATIONS: Final = 4


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """How much of a matrix to keep, by exactly one of three bounds; raises `ValueError` for none, several or a bad one.

    `rank` keeps so many singular values, `energy` the fewest whose squares make that share of all squares, `error` the
    fewest that leave a relative Frobenius error of at most that.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        if len(self.bound) != 1:
            raise ValueError(f"expected one of rank, energy and error, got {', '.join(self.bound) or 'none'}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"expected a rank of at least 1, got {self.rank}")
        for name, share in (("energy", self.energy), ("error", self.error)):
            if share is not None and not 0 < share < 1:
                raise ValueError(f"expected {name} between 0 and 1, got {share}")

    @property
    def bound(self) -> dict[str, float]:
        """The bound that was given, by its name."""
        given = {"rank": self.rank, "energy": self.energy, "error": self.error}
        return {name: value for name, value in given.items() if value is not None}

    def rank_of(self, tails: Tensor) -> int | None:
        """The least rank that keeps enough; None where no rank of these does.

        `tails` (n + 1,) says how much energy is lost at rank 0 (all of it), 1, … n.
        """
        if self.rank is not None:
            return min(self.rank, len(tails) - 1)
        lost = 1 - self.energy if self.energy is not None else (self.error or 0.0) ** 2
        enough = (tails <= lost * tails[0]).nonzero()
        return int(enough[0]) if len(enough) else None


@dataclass(frozen=True, kw_only=True)
class Factors:
    """B A ≈ a matrix (d_out, d_in), with the roots of the singular values in both; energies are sums of squares."""

    a: Tensor
    """(rank, d_in)"""
    b: Tensor
    """(d_out, rank)"""
    energy: float
    discarded: float

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.a.shape[0]


@dataclass(frozen=True, kw_only=True)
class _Spectrum:
    """U (d_out, n), S (n,), Vᵀ (n, d_in), and the energy that lies outside them."""

    u: Tensor
    s: Tensor
    vt: Tensor
    outside: float

    def tails(self) -> Tensor:
        """The energy lost at each rank from 0 to n, in fp64; summed from the small end, where differences cancel."""
        squares = torch.cat([self.s.double().square(), torch.zeros(1, dtype=torch.float64, device=self.s.device)])
        return squares.flip(0).cumsum(0).flip(0) + self.outside


def factorise(matrix: Tensor, truncation: Truncation) -> Factors:
    """The best B A within the bound, of a finite matrix (d_out, d_in) that is not all zero; computed in fp32."""
    matrix = matrix.float()
    found = _spectrum(matrix, truncation)
    tails = found.tails()
    rank = min(truncation.rank_of(tails) or 1, _numerical_rank(found.s, matrix.shape))
    root = found.s[:rank].sqrt()
    return Factors(
        a=(root[:, None] * found.vt[:rank]).contiguous(),
        b=(found.u[:, :rank] * root).contiguous(),
        energy=float(tails[0]),
        discarded=float(tails[rank]),
    )


def _spectrum(matrix: Tensor, truncation: Truncation) -> _Spectrum:
    smaller = min(matrix.shape)
    width = (truncation.rank or _FIRST_WIDTH) + _OVERSAMPLING
    while smaller > EXACT_UP_TO and 2 * width <= smaller:
        found = _sketch(matrix, width)
        if truncation.rank_of(found.tails()) is not None:
            return found
        width *= 2
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return _Spectrum(u=u, s=s, vt=vt, outside=0.0)


def _sketch(matrix: Tensor, width: int) -> _Spectrum:
    """The leading `width` singular values as a seeded random projection finds them."""
    seeded = torch.Generator().manual_seed(0)
    q = _orthonormal(matrix @ torch.randn(matrix.shape[1], width, generator=seeded).to(matrix.device))
    for _ in range(_POWER_ITERATIONS):
        q = _orthonormal(matrix @ _orthonormal(matrix.T @ q))
    within = q.T @ matrix
    u, s, vt = torch.linalg.svd(within, full_matrices=False)
    outside = torch.addmm(matrix, q, within, alpha=-1).norm(dtype=torch.float64).square()
    return _Spectrum(u=q @ u, s=s, vt=vt, outside=float(outside))


def _orthonormal(columns: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(columns).Q
    return q


def _numerical_rank(s: Tensor, shape: torch.Size) -> int:
    """Singular values above rounding, as NumPy's matrix_rank counts them; at least one."""
    return max(1, int((s > s[0] * torch.finfo(s.dtype).eps * max(shape)).sum()))


__all__ = ["EXACT_UP_TO", "Factors", "Truncation", "factorise"]
