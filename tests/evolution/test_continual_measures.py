"""Average accuracy, forgetting and backward transfer, worked out by hand."""

from __future__ import annotations

import pytest

from evolution.continual_measures import Measures, measures
from evolution.errors import TrainingError


def test_the_measures_are_those_of_the_papers() -> None:
    found = measures([[0.8], [0.9, 0.7], [0.5, 0.6, 1.0]])
    # forgetting: (0.9 − 0.5 + 0.7 − 0.6) / 2; backward transfer: (0.5 − 0.8 + 0.6 − 0.7) / 2
    assert found.average_accuracy == pytest.approx(0.7)
    assert found.forgetting == pytest.approx(0.25)
    assert found.backward_transfer == pytest.approx(-0.2)


def test_one_task_forgets_nothing() -> None:
    assert measures([[0.8]]) == Measures(average_accuracy=0.8, forgetting=0.0, backward_transfer=0.0)


@pytest.mark.parametrize("rows", [[], [[0.5, 0.5]], [[0.5], [0.5]]])
def test_rows_that_are_no_triangle_are_refused(rows: list[list[float]]) -> None:
    with pytest.raises(TrainingError, match="accuracies after each task"):
        measures(rows)
