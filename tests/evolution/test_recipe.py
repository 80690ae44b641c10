"""A recipe says in one place where a model is adapted."""

from __future__ import annotations

import pytest

from evolution.errors import JobError
from evolution.recipe import Recipe
from evolution.training_job import FineTuning


def test_targets_are_said_once() -> None:
    with pytest.raises(JobError, match="got modules"):
        Recipe(tuning=FineTuning(targets=("up_proj",)))


@pytest.mark.parametrize("shares", [{"replay_share": 0.0}, {"more_replay": 0.0}])
def test_hot_targets_need_replay(shares: dict[str, float]) -> None:
    assert Recipe(**shares).targets == "mlp"  # type: ignore[arg-type]
    with pytest.raises(JobError, match="expected replay"):
        Recipe(targets="hot", **shares)  # type: ignore[arg-type]
