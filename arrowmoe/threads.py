"""What threads of numeric libraries do on a CPU; must be said before torch and numpy are imported.

torch's: the default (spin for ever) makes a loaded machine 4 to 8 times slower; sleeping at once costs 40 µs to wake up
for each of the hundreds of small operations of a decode step, 1.3 × the bare base model instead of 1.02. So: spin for
some microseconds, then sleep. numpy's and SciPy's: the router solves many systems too small to share, where a second
thread only waits for the first (11 ms with one, 20 to 120 ms with two, for a card to arrive among a thousand).
"""

from __future__ import annotations

import os
from collections.abc import Mapping

THREADS: Mapping[str, str] = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000", "OPENBLAS_NUM_THREADS": "1"}


def set_threads() -> None:
    """Set the environment for this process and its children, unless it says something already."""
    for name, value in THREADS.items():
        os.environ.setdefault(name, value)


__all__ = ["THREADS", "set_threads"]
