"""A matrix as B A against NumPy's SVD in fp64: planted ranks come back, bounds hold, and no smaller rank would do."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from registry.low_rank import Approximation, Cut, Term, decompose, reduce

Array = npt.NDArray[np.float32]
SMALL, LARGE = (48, 80), (1064, 1124)
"""The small one is decomposed whole, the large one sketched."""


def with_spectrum(shape: tuple[int, int], values: list[float], seed: int = 0) -> Array:
    """A matrix with these singular values and no others."""
    random = np.random.default_rng(seed)
    u = np.linalg.qr(random.standard_normal((shape[0], len(values)))).Q
    v = np.linalg.qr(random.standard_normal((shape[1], len(values)))).Q
    return np.asarray((u * np.array(values)) @ v.T, dtype=np.float32)


def missed(found: Approximation, matrix: Array) -> float:
    """The squared distance."""
    return float(np.linalg.norm(found.term.b.astype(float) @ found.term.a - matrix) ** 2)


@pytest.mark.parametrize("shape", [SMALL, SMALL[::-1], LARGE])
@pytest.mark.parametrize("bound", [{"rank": 16}, {"rank": 24}, {"energy": 1 - 1e-9}, {"error": 1e-4}])
def test_a_planted_matrix_comes_back_with_its_rank(shape: tuple[int, int], bound: dict[str, Any]) -> None:
    planted = with_spectrum(shape, [1.0 + 0.1 * index for index in range(16)])
    found = decompose(planted, Cut(**bound))
    assert found.term.rank == 16
    assert (missed(found, planted) / np.linalg.norm(planted) ** 2) ** 0.5 < 1e-5


@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize(
    "bounds",
    [{"rank": 5}, {"energy": 0.9}, {"energy": 0.99}, {"error": 0.2}, {"error": 0.5}, {"rank": 5, "energy": 0.99},
     {"rank": 30, "energy": 0.9}, {"energy": 0.9, "error": 0.1}],
)  # fmt: skip
def test_the_bounds_hold_with_the_least_rank_and_the_loss_is_told(
    shape: tuple[int, int], bounds: dict[str, Any]
) -> None:
    values = [0.8**index for index in range(40)]
    matrix = with_spectrum(shape, values)
    squares = np.square(values)
    lost = [squares[rank:].sum() / squares.sum() for rank in range(41)]
    allowed = {"energy": lambda share: 1 - share, "error": lambda share: share**2}
    rank = min(
        value if name == "rank" else next(index for index, one in enumerate(lost) if one <= allowed[name](value))
        for name, value in bounds.items()
    )
    found = decompose(matrix, Cut(**bounds))
    assert found.term.rank == rank
    assert found.wanted == pytest.approx(squares.sum(), rel=1e-5)
    assert found.missed / found.wanted == pytest.approx(lost[rank], rel=1e-3)
    assert found.missed == pytest.approx(missed(found, matrix), rel=1e-3)


def test_a_large_matrix_that_is_not_of_low_rank_is_decomposed_whole() -> None:
    matrix = np.random.default_rng(1).standard_normal(LARGE, dtype=np.float32)
    squares = np.square(np.linalg.svd(matrix, compute_uv=False).astype(np.float64))
    found = decompose(matrix, Cut(energy=0.9))
    assert found.term.rank == int(np.searchsorted(squares.cumsum() / squares.sum(), 0.9)) + 1
    assert found.missed / found.wanted <= 0.1


@pytest.mark.parametrize("rank", [8, 64])
def test_a_sketch_of_a_flat_spectrum_is_nearly_the_best(rank: int) -> None:
    """Noise is the hardest case: no direction stands out."""
    matrix = np.random.default_rng(1).standard_normal(LARGE, dtype=np.float32)
    squares = np.square(np.linalg.svd(matrix, compute_uv=False).astype(np.float64))
    found = decompose(matrix, Cut(rank=rank))
    assert found.missed == pytest.approx(missed(found, matrix), rel=1e-3)
    assert found.missed < 1.01 * squares[rank:].sum()


@pytest.mark.parametrize("decomposed", ["whole", "by factors"])
def test_the_roots_of_the_singular_values_stand_in_both(decomposed: str) -> None:
    matrix = with_spectrum(SMALL, [4.0, 1.0])
    term = Term(a=matrix, b=np.eye(SMALL[0], dtype=np.float32))
    found = decompose(matrix, Cut(rank=2)) if decomposed == "whole" else reduce([term], Cut(rank=2))
    assert np.linalg.norm(found.term.a, axis=1) == pytest.approx([2.0, 1.0], rel=1e-5)
    assert np.linalg.norm(found.term.b, axis=0) == pytest.approx([2.0, 1.0], rel=1e-5)


def test_what_is_rounding_is_no_rank() -> None:
    random = np.random.default_rng(2)
    one = Term(a=random.standard_normal((3, 9)), b=random.standard_normal((7, 3)))
    twice = reduce([one, Term(a=one.a, b=one.b, factor=0.5)], Cut())
    assert twice.term.rank == 3
    np.testing.assert_allclose(twice.term.b @ twice.term.a, 1.5 * one.b @ one.a, rtol=1e-9)
    assert decompose(with_spectrum(SMALL, [3.0, 2.0, 1.0]), Cut()).term.rank == 3


@pytest.mark.parametrize("bounds", [{}, {"rank": 5}, {"energy": 0.9}])
@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_a_cut_of_nothing_keeps_one(shape: tuple[int, int], bounds: dict[str, Any]) -> None:
    found = decompose(np.zeros(shape, dtype=np.float32), Cut(**bounds))
    assert (found.term.rank, found.wanted, found.missed) == (1, 0, 0)


def test_the_same_matrix_gives_the_same_bits() -> None:
    matrix = with_spectrum(LARGE, [1.0] * 30)
    one, other = (decompose(matrix, Cut(rank=8)).term for _ in range(2))
    assert np.array_equal(one.a, other.a)
    assert np.array_equal(one.b, other.b)


@pytest.mark.parametrize("bound", [{"rank": 0}, {"energy": 0.0}, {"energy": 1.5}, {"error": -1.0}, {"error": 1.1}])
def test_bounds_that_cannot_be_are_refused(bound: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Cut(**bound)
