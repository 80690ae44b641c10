"""What merging makes of terms c B A beyond their exact or shortened sum: PEFT's `linear`, TIES and DARE.

TIES and DARE look at single elements, so they need the dense matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt

import numpy as np
import numpy.typing as npt

from registry.low_rank import Approximation, Cut, Matrix, Term, concatenate, decompose


def add_factors(terms: Sequence[Term]) -> Approximation:
    """(Σ √|c| B)(Σ ±√|c| A), lower ranks padded with zeros: for terms that descend from one another.

    This is PEFT's `linear`; its cross terms are what it misses of Σ c B A.
    """
    rank = max(term.rank for term in terms)
    a = sum(_padded(sqrt(abs(term.factor)) * term.a, (rank, term.shape[1])) for term in terms)
    b = sum(_padded(np.copysign(sqrt(abs(term.factor)), term.factor) * term.b, (term.shape[0], rank)) for term in terms)
    added, whole = Term(a=np.asarray(a), b=np.asarray(b)), concatenate(terms)
    difference = concatenate([added, replace(whole.term, factor=-1.0)])
    return Approximation(term=added, wanted=whole.wanted, missed=difference.wanted)


def ties(terms: Sequence[Term], density: float, cut: Cut) -> Approximation:
    """TIES (arXiv:2306.01708, §3) of the dense matrices, cut off.

    Of each the share `density` of its greatest elements stays; each element's sign is that of the sum; the elements
    of that sign are averaged over the terms that have one there.
    """
    trimmed = [trim(term.dense(), density) for term in terms]
    elected = np.sign(np.sum(trimmed, axis=0))
    total, count = np.zeros_like(elected), np.zeros_like(elected)
    for matrix in trimmed:
        agrees = (np.sign(matrix) == elected) & (matrix != 0)
        total += np.where(agrees, matrix, 0)
        count += agrees
    return decompose(total / np.maximum(count, 1), cut)


def dare(terms: Sequence[Term], density: float, cut: Cut, generators: Sequence[np.random.Generator]) -> Approximation:
    """DARE (arXiv:2311.03099, §3.2) of the dense matrices, summed and cut off.

    Of each an element stays with probability `density`, and is divided by it.
    """
    total = np.zeros(terms[0].shape, dtype=np.float32)
    for term, generator in zip(terms, generators, strict=True):
        stays = generator.random(term.shape, dtype=np.float32) < density
        total += np.where(stays, term.dense() / np.float32(density), np.float32(0))
    return decompose(total, cut)


def trim(matrix: npt.NDArray[np.float32], density: float) -> npt.NDArray[np.float32]:
    """`matrix` with only the share `density` of its elements, those of greatest magnitude; one at least."""
    keep = max(1, int(density * matrix.size))
    greatest = np.argpartition(np.abs(matrix), matrix.size - keep, axis=None)[matrix.size - keep :]
    trimmed = np.zeros_like(matrix)
    trimmed.flat[greatest] = matrix.flat[greatest]
    return trimmed


def _padded(matrix: Matrix, shape: tuple[int, int]) -> Matrix:
    padded = np.zeros(shape, dtype=np.float64)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded


__all__ = ["add_factors", "dare", "ties", "trim"]
