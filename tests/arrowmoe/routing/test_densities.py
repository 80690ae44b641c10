"""Mixtures over a shared covariance against densities written with slogdet and solve."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrowmoe.routing.densities import Array, Dense, Isotropic, Mixture
from tests.arrowmoe.routing.synthetic import log_mixture, log_normal


def positive_definite(random: np.random.Generator, dimension: int) -> Array:
    root = random.standard_normal((dimension, dimension))
    return np.asarray(root @ root.T / dimension + 0.1 * np.eye(dimension))


@given(
    seed=st.integers(0, 1 << 16),
    dimension=st.integers(1, 7),
    components=st.integers(1, 4),
    rank=st.integers(0, 9),
    isotropic=st.booleans(),
)
def test_a_mixture_is_the_plain_formula(seed: int, dimension: int, components: int, rank: int, isotropic: bool) -> None:
    random = np.random.default_rng(seed)
    covariance = 0.3 * np.eye(dimension) if isotropic else positive_definite(random, dimension)
    base = Isotropic(0.3, dimension) if isotropic else Dense(covariance)
    means, factor = random.standard_normal((components, dimension)), random.standard_normal((rank, dimension))
    weights = random.dirichlet(np.ones(components)) * 0.9 + 0.1 / components
    x = random.standard_normal((5, dimension))
    whole = covariance + factor.T @ factor

    mixture = Mixture(means, weights, factor, base)
    values, nearest = mixture.log_density(base.whiten(x))

    assert mixture.logdet == pytest.approx(np.linalg.slogdet(whole)[1], abs=1e-8)
    assert values == pytest.approx(log_mixture(x, weights, means, whole), abs=1e-7, rel=1e-7)
    assert nearest.tolist() == np.argmax([log_normal(x, mean, whole) for mean in means], axis=0).tolist()


def test_the_standard_normal_by_hand() -> None:
    base = Isotropic(1.0, 2)
    mixture = Mixture(np.zeros((1, 2)), np.ones(1), np.zeros((0, 2)), base)
    values, _ = mixture.log_density(base.whiten(np.array([[0.0, 0.0], [3.0, 4.0]])))
    assert values.tolist() == [0.0, -12.5]


def test_whitened_rows_have_the_lengths_that_the_covariance_gives_them() -> None:
    random = np.random.default_rng(0)
    covariance, rows = positive_definite(random, 5), random.standard_normal((3, 5))
    white = Dense(covariance).whiten(rows)
    assert white @ white.T == pytest.approx(rows @ np.linalg.solve(covariance, rows.T))
    assert Isotropic(0.5, 5).whiten(rows) == pytest.approx(np.sqrt(2) * rows)
    assert Isotropic(0.5, 5).logdet == pytest.approx(5 * np.log(0.5))
