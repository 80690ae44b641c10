"""Factorising against NumPy's SVD in fp64: planted ranks come back, bounds hold, and no smaller rank would do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from evolution.low_rank import EXACT_UP_TO, Truncation, factorise

SMALL = (48, 80)
LARGE = (EXACT_UP_TO + 40, EXACT_UP_TO + 100)


def with_spectrum(shape: tuple[int, int], values: list[float], seed: int = 0) -> torch.Tensor:
    """A matrix with these singular values and no others."""
    random = np.random.default_rng(seed)
    u = np.linalg.qr(random.standard_normal((shape[0], len(values)))).Q
    v = np.linalg.qr(random.standard_normal((shape[1], len(values)))).Q
    return torch.from_numpy((u * np.array(values)) @ v.T).float()


@pytest.mark.parametrize("shape", [SMALL, SMALL[::-1], LARGE])
@pytest.mark.parametrize("bound", [{"rank": 16}, {"rank": 24}, {"energy": 1 - 1e-9}, {"error": 1e-4}])
def test_a_planted_matrix_comes_back_with_its_rank(shape: tuple[int, int], bound: dict[str, Any]) -> None:
    planted = with_spectrum(shape, [1.0 + 0.1 * index for index in range(16)])
    found = factorise(planted, Truncation(**bound))
    assert found.rank == 16
    assert float((found.b @ found.a - planted).norm() / planted.norm()) < 1e-5


@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("bound", [{"rank": 5}, {"energy": 0.9}, {"energy": 0.99}, {"error": 0.2}, {"error": 0.5}])
def test_the_bound_holds_with_the_least_rank_and_the_loss_is_told(
    shape: tuple[int, int], bound: dict[str, Any]
) -> None:
    values = [0.8**index for index in range(40)]
    matrix = with_spectrum(shape, values)
    squares = np.square(values)
    lost = [squares[rank:].sum() / squares.sum() for rank in range(41)]
    allowed = {"energy": lambda share: 1 - share, "error": lambda share: share**2}
    (name, value), *_ = bound.items()
    rank = value if name == "rank" else next(index for index, one in enumerate(lost) if one <= allowed[name](value))

    found = factorise(matrix, Truncation(**bound))
    assert found.rank == rank
    assert found.energy == pytest.approx(squares.sum(), rel=1e-5)
    assert found.discarded / found.energy == pytest.approx(lost[rank], rel=1e-3)
    real = float((found.b @ found.a - matrix).double().square().sum())
    assert found.discarded == pytest.approx(real, rel=1e-3)


def test_a_large_matrix_that_is_not_of_low_rank_is_decomposed_whole() -> None:
    matrix = torch.randn(LARGE, generator=torch.Generator().manual_seed(1))
    squares = np.square(np.linalg.svd(matrix.numpy(), compute_uv=False).astype(np.float64))
    found = factorise(matrix, Truncation(energy=0.9))
    assert found.rank == int(np.searchsorted(squares.cumsum() / squares.sum(), 0.9)) + 1
    assert found.discarded / found.energy <= 0.1


def test_the_roots_of_the_singular_values_stand_in_both() -> None:
    found = factorise(with_spectrum(SMALL, [4.0, 1.0]), Truncation(rank=2))
    torch.testing.assert_close(found.a.norm(dim=1), torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(found.b.norm(dim=0), torch.tensor([2.0, 1.0]))


def test_the_same_matrix_gives_the_same_bits() -> None:
    matrix = with_spectrum(LARGE, [1.0] * 30)
    one, other = (factorise(matrix, Truncation(rank=8)) for _ in range(2))
    assert torch.equal(one.a, other.a)
    assert torch.equal(one.b, other.b)


@pytest.mark.parametrize(
    "bound", [{}, {"rank": 4, "energy": 0.9}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}, {"error": -1.0}]
)
def test_one_sensible_bound_is_wanted(bound: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Truncation(**bound)
