"""Whether memory grows, told from readings that wander."""

from __future__ import annotations

import numpy as np

from benchmarks.soak import slope


def readings(grown_a_second: float, seed: int) -> list[tuple[float, int]]:
    """Half an hour that starts with a jump of 50 MB, then noise of 1 MB."""
    noise = np.random.default_rng(seed).normal(0, 1e6, 900)
    return [
        (2.0 * at, int(1e9 + (0 if at < 100 else 5e7) + 2.0 * at * grown_a_second + noise[at])) for at in range(900)
    ]


def test_memory_that_settled_does_not_grow_and_a_leak_does() -> None:
    flat = [slope(readings(0.0, seed)) for seed in range(40)]
    assert sum(abs(found) <= half for found, half in flat) >= 34  # 95 % of 40 is 38
    for seed in range(5):
        found, half = slope(readings(20_000.0, seed))
        assert found - half > 0
        assert abs(found - 20_000) < 2_000
