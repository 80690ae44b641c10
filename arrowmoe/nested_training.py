"""What `arrowmoe evolve nested` does: task after task on slow and fast LoRAs, and cards of what came of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from arrowmoe import nested_view, views
from arrowmoe.base_model import load_base_model, load_image_model
from evolution.errors import TrainingError
from evolution.nested_cards import Part, card_of
from evolution.nested_experiment import ConsolidationSpec, NestedExperiment
from evolution.nested_model import NestedModel, opened
from evolution.nested_trainer import NestedTrainer, OnTaskStep
from registry.store import Registry

Json = dict[str, Any]


def train(path: Path, on_step: OnTaskStep | None = None) -> Json:
    """Learn what an experiment's file says. Raises `ModelLoadError` and `TrainingError`."""
    experiment = NestedExperiment.load(path)
    NestedTrainer(experiment, *_loaded(experiment)).run(on_step)
    return nested_view.show(experiment.output)


def consolidate(output: Path, task: str, how: Json) -> Json:
    """Consolidate what a task has kept for itself, with the fields of `ConsolidationSpec`. Raises `TrainingError`."""
    try:
        spec = ConsolidationSpec(**how)
    except ValidationError as error:
        raise TrainingError(f"expected a consolidation, got {how}: {error}") from error
    experiment = NestedExperiment.of(output)
    return asdict(NestedTrainer(experiment, *_loaded(experiment)).consolidate(task, spec))


def roll_back(output: Path) -> Json:
    """Undo the last consolidation; which task's it was. Raises `TrainingError`."""
    experiment = NestedExperiment.of(output)
    return {"task": NestedTrainer(experiment, *_loaded(experiment)).roll_back(), "output": str(experiment.output)}


def evaluate(output: Path) -> list[Json]:
    """Ask every task's test again. Raises `TrainingError`."""
    experiment = NestedExperiment.of(output)
    with opened(experiment, *_loaded(experiment)) as learnt:
        shares = [
            learnt.right(learnt.subject.read(task.test_url), number)
            for number, task in enumerate(experiment.tasks[: len(learnt.state.tasks)])
        ]
    names = [task.name for task in experiment.tasks]
    return [{"task": name, "untold": untold, "told": told} for name, (untold, told) in zip(names, shares, strict=False)]


def export(registry: Registry, output: Path, name: str) -> list[Json]:
    """Publish the slow pair as NAME, what a task has kept for itself as NAME-TASK, and all together as NAME-all.

    Raises `TrainingError`, and `LabelTakenError` for a name that means another card.
    """
    experiment = NestedExperiment.of(output)
    with opened(experiment, *_loaded(experiment)) as learnt:
        return [views.card(entry) for entry in _published(registry, experiment, learnt, name)]


def _published(registry: Registry, experiment: NestedExperiment, learnt: NestedModel, name: str) -> list[Any]:
    about = {
        "base_name": experiment.base.name,
        "training": {"experiment": learnt.state.experiment, "learnt": [task.name for task in learnt.state.tasks]},
    }

    def publish(part: Part, label: str, parents: tuple[str, ...] = ()) -> Any:
        return registry.publish(card_of(learnt.nested, part, name=label, parents=list(parents), **about))

    slow = publish("slow", name)
    own = [
        publish(pair, f"{name}-{experiment.tasks[task].name}", (slow.digest,))
        for pair, task in enumerate(learnt.state.held)
        if task is not None
    ]
    if not own:
        return [slow]
    return [slow, *own, publish(experiment.combine, f"{name}-all", (slow.digest, *(entry.digest for entry in own)))]


def _loaded(experiment: NestedExperiment) -> tuple[Any, Any]:
    spec = experiment.base
    if experiment.kind == "image":
        return load_image_model(spec.model, dtype=spec.dtype, device=spec.device), None
    base = load_base_model(spec.model, name=spec.name, dtype=spec.dtype, device=spec.device, kind="causal")
    return base.model, base.tokenizer


__all__ = ["consolidate", "evaluate", "export", "roll_back", "train"]
