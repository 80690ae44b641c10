"""What becomes of a learnt task's fast pair: consolidated, looked at, and rolled back where that costs too much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evolution.consolidation import Consolidation, consolidate, roll_back
from evolution.errors import TrainingError
from evolution.nested_experiment import ConsolidationSpec, NestedExperiment
from evolution.nested_model import NestedModel
from evolution.nested_state import Settled
from evolution.nested_undo import keep_before
from evolution.replay_buffer import Item
from registry.logs import get_logger

log = get_logger(__name__)


def settle(experiment: NestedExperiment, learnt: NestedModel, task: int, spec: ConsolidationSpec) -> Settled:
    """Consolidate the fast pair of `task`, and look at that task and all before it; the pair is free if it is empty.

    What was there before stays on disk (`evolution.nested_undo`). Raises `TrainingError` for a task that has no pair of
    its own.
    """
    pair = learnt.state.pair_of(task)
    if pair is None:
        raise TrainingError(f"expected a task with a fast pair, got {experiment.tasks[task].name!r}, which has none")
    looked_at = {} if spec.tolerance is None else _looked_at(experiment, learnt, task)
    before, was = _mean_right(experiment, learnt, looked_at), learnt.checkpoint()
    done = consolidate(learnt.nested, pair, Consolidation(**spec.model_dump(exclude={"tolerance"})))
    if not spec.left:
        learnt.hold(pair, None)
    after = _mean_right(experiment, learnt, looked_at)
    kept = before is None or after is None or before - after <= (spec.tolerance or 0.0)
    if kept:
        keep_before(experiment.output, task, was)
    else:
        roll_back(learnt.nested, done)
        learnt.hold(pair, task)
        name = experiment.tasks[task].name
        log.warning("consolidation_rolled_back", task=name, right_before=before, right_after=after)
    return Settled(
        kept=kept,
        rank=max(cut.rank for cut in done.cuts.values()),
        lost_energy=max(cut.lost_energy for cut in done.cuts.values()),
        right_before=before,
        right_after=after,
    )


def replayed_rows(experiment: NestedExperiment, learnt: NestedModel, items: Sequence[Item]) -> list[Any]:
    """The rows that items of a replay name."""
    read = {
        task: learnt.subject.read(experiment.tasks[task].data_url) for task in sorted({item.task for item in items})
    }
    return [read[item.task][item.row] for item in items]


def _looked_at(experiment: NestedExperiment, learnt: NestedModel, last: int) -> dict[int, Sequence[Any]]:
    found: dict[int, Sequence[Any]] = {}
    for number, task in enumerate(experiment.tasks[: last + 1]):
        if task.validation is not None:
            found[number] = learnt.subject.read(task.validation.data_url)
        elif items := [item for item in learnt.state.replay if item.task == number]:
            found[number] = replayed_rows(experiment, learnt, items)
    return found


def _mean_right(
    experiment: NestedExperiment, learnt: NestedModel, looked_at: Mapping[int, Sequence[Any]]
) -> float | None:
    """Images are looked at with no task named, texts with theirs: as they are asked in the end."""
    place = 0 if experiment.kind == "image" else 1
    shares = [learnt.right(rows, task)[place] for task, rows in looked_at.items()]
    return sum(shares) / len(shares) if shares else None


__all__ = ["replayed_rows", "settle"]
