"""What a sequence of tasks came to, from accuracies R[i][j]: on task j after task i was learnt, i ≥ j.

Average accuracy and backward transfer as in Lopez-Paz and Ranzato 2017 (arXiv:1706.08840), forgetting as in Chaudhry
et al. 2018 (arXiv:1801.10112): how much worse each earlier task is at the end than it was at its best before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evolution.errors import TrainingError

Accuracies = Sequence[Sequence[float]]
"""Row i has the i + 1 tasks that were learnt by then, as shares of right answers."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Shares of right answers, and differences of such; of one task alone nothing can be forgotten, which is 0."""

    average_accuracy: float
    forgetting: float
    backward_transfer: float


def measures(accuracies: Accuracies) -> Measures:
    """The measures after the last row. Raises `TrainingError` unless row i has i + 1 accuracies."""
    if not accuracies or [len(row) for row in accuracies] != list(range(1, len(accuracies) + 1)):
        raise TrainingError(f"expected 1, 2, … accuracies after each task, got {[len(row) for row in accuracies]}")
    *before, last = accuracies
    best = [max(row[task] for row in before if task < len(row)) for task in range(len(before))]
    return Measures(
        average_accuracy=_mean(last),
        forgetting=_mean([best[task] - last[task] for task in range(len(before))]),
        backward_transfer=_mean([last[task] - before[task][task] for task in range(len(before))]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


__all__ = ["Accuracies", "Measures", "measures"]
