"""Made-up prompts in spaces of a few dimensions, and a probe for them."""

from __future__ import annotations

import numpy as np

from arrowmoe.features import Vectors
from arrowmoe.routing.densities import Array
from arrowmoe.routing.probe import Probe
from arrowmoe.routing.statistics import CardStatistics, summarise
from registry.digest import digest_of

EMBEDDER = "synthetic"
PROBE_DIGEST = digest_of(b"probe")


def unit(rows: Array) -> Vectors:
    """Rows scaled to unit length, in the featurizers' precision."""
    scaled = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(scaled, dtype=np.float32)


def prompts(random: np.random.Generator, centres: Array, each: int, spread: float = 0.2) -> tuple[Vectors, list[str]]:
    """`each` unit vectors around every centre, and the number of its centre for each."""
    rows = np.repeat(centres, each, axis=0)
    labels = [str(index) for index in range(len(centres)) for _ in range(each)]
    return unit(rows + spread * random.standard_normal(rows.shape)), labels


def centres(random: np.random.Generator, number: int, dimension: int) -> Array:
    return unit(random.standard_normal((number, dimension))).astype(np.float64)


def probe(dimension: int, seed: int = 0) -> Probe:
    """Of 500 vectors, a little off the origin, as embedders' are."""
    random = np.random.default_rng(seed)
    rows = unit(random.standard_normal((500, dimension)) + 0.3).astype(np.float64)
    return Probe(embedder=EMBEDDER, digest=PROBE_DIGEST, mean=rows.mean(axis=0), covariance=np.cov(rows.T, bias=True))


def card_of(
    random: np.random.Generator, dimension: int, *, intents: int = 3, each: int = 8, rank: int = 4
) -> CardStatistics:
    """Statistics of a card of `intents` around random centres; `rank` 0 leaves the sketch out."""
    vectors, labels = prompts(random, centres(random, intents, dimension), each)
    budget = intents * (2 * dimension + 4) + rank * 2 * dimension
    return summarise(vectors, embedder=EMBEDDER, probe=PROBE_DIGEST, labels=labels, budget_bytes=budget)


def log_normal(x: Array, mean: Array, covariance: Array) -> Array:
    """Log density (n,) of rows, but for −d/2 · log 2π, as it stands in a textbook."""
    apart = x - mean
    _, logdet = np.linalg.slogdet(covariance)
    return np.array([-(logdet + row @ np.linalg.solve(covariance, row)) / 2 for row in apart])


def log_mixture(x: Array, weights: Array, means: Array, covariance: Array) -> Array:
    """Log density (n,) of a mixture whose components share their covariance."""
    parts = [np.log(weight) + log_normal(x, mean, covariance) for weight, mean in zip(weights, means, strict=True)]
    return np.asarray(np.logaddexp.reduce(parts, axis=0))
