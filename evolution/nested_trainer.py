"""Trains task after task on slow and fast LoRAs, consolidates at each task's end, and says what is still known.

    state = NestedTrainer(experiment, model, tokenizer).run(on_step)     # evolution.nested_state.NestedState
    state.told, state.untold              # accuracy[after task][of task]: with the task named, and without
    state.measures["untold"].forgetting   # average_accuracy, forgetting, backward_transfer
    with opened(experiment, model, tokenizer) as learnt:                 # evolution.nested_model: to ask it more
        learnt.right(learnt.subject.read(url), task)

Other ways to learn are special cases of an experiment: one LoRA for all tasks has `trains="slow"` and no consolidation,
a LoRA for each has `trains="fast"` and none (told, it has its oracle), a moving average has (slow, fast) = (β, 1 − β).

A run that was killed goes on where it was, bit for bit: within a task from its checkpoint, else from the last task. A
fast pair that was consolidated whole is given to the next task, so with a rank for slow and a replay of a fixed size
memory does not grow with tasks, but for the head's rows. The model is left as it was.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evolution.descent import Course, Descended, Descent, forget
from evolution.errors import TrainingError
from evolution.nested_experiment import EXPERIMENT, ConsolidationSpec, NestedExperiment
from evolution.nested_loss import Lesson, Replayed, TaskLoss
from evolution.nested_model import NestedModel, opened
from evolution.nested_settling import replayed_rows, settle
from evolution.nested_state import NestedState, Settled, TaskReport
from evolution.nested_subjects import Images
from evolution.nested_undo import forget_before, undo
from evolution.replay_buffer import Item, refreshed
from evolution.training_job import OnStep, Step
from registry.digest import Digest
from registry.logs import get_logger

OnTaskStep = Callable[[str, Step], None]
"""Is told the task's name with each step."""

log = get_logger(__name__)


class NestedTrainer:
    """Learns the tasks of an experiment on `model`; one of kind "text" needs the tokenizer."""

    def __init__(self, experiment: NestedExperiment, model: Any, tokenizer: Any = None) -> None:
        self._experiment, self._model, self._tokenizer = experiment, model, tokenizer

    def run(self, on_step: OnTaskStep | None = None) -> NestedState:
        """Learn what is not learnt yet. Raises `TrainingError`."""
        experiment = self._experiment
        experiment.output.mkdir(parents=True, exist_ok=True)
        with opened(experiment, self._model, self._tokenizer) as learnt:
            experiment.save(experiment.output / EXPERIMENT)
            for number in range(len(experiment.tasks)):
                if number >= len(learnt.state.tasks):
                    _Task(experiment, learnt, number).learn(on_step)
                # One that was killed between the two leaves a checkpoint that nobody needs.
                forget(_directory(experiment, number))
            learnt.state.write(experiment.output)
            return learnt.state

    def consolidate(self, task: str, how: ConsolidationSpec) -> Settled:
        """Consolidate what a task has kept for itself. Raises `TrainingError`, also where it has nothing."""
        experiment = self._experiment
        names = [one.name for one in experiment.tasks]
        with opened(experiment, self._model, self._tokenizer) as learnt:
            if task not in names[: len(learnt.state.tasks)]:
                raise TrainingError(f"expected a task that was learnt, got {task!r}")
            settled = settle(experiment, learnt, names.index(task), how)
            # A task under way stands on the slow pairs of before.
            forget(_directory(experiment, len(learnt.state.tasks)))
            learnt.save(experiment)
            return settled

    def roll_back(self) -> str:
        """Undo the last consolidation, bit for bit, and ask the tests again; the name of its task.

        Raises `TrainingError` where there was none, or where another task was learnt since.
        """
        experiment = self._experiment
        with opened(experiment, self._model, self._tokenizer) as learnt:
            task = undo(experiment.output, learnt)
            state, (untold, told) = learnt.state, _judged(experiment, learnt)
            tasks = [*state.tasks]
            if (settled := tasks[task].consolidation) is not None:
                tasks[task] = replace(tasks[task], consolidation=replace(settled, kept=False))
            learnt.state = replace(
                state, tasks=tuple(tasks), untold=(*state.untold[:-1], untold), told=(*state.told[:-1], told)
            )
            # A task under way stands on the slow pairs of before.
            forget(_directory(experiment, len(tasks)))
            learnt.save(experiment)
        forget_before(experiment.output)
        return experiment.tasks[task].name


class _Task:
    def __init__(self, experiment: NestedExperiment, learnt: NestedModel, number: int) -> None:
        self._experiment, self._learnt, self._number = experiment, learnt, number
        self._task, self._data = experiment.tasks[number], experiment.tasks[number].digest()
        # Each task has its own draws, whatever came before it, so that a run can begin at any of them.
        self._seed = experiment.tuning.seed + number
        self._rows = learnt.subject.read(self._task.data_url)

    def learn(self, on_step: OnTaskStep | None) -> None:
        learnt = self._learnt
        replay = self._replayed()
        torch.manual_seed(self._seed)
        learnt.subject.meet(self._rows)
        pair = learnt.take_pair(self._number, self._seed)
        done = self._descend(pair, replay, on_step)
        learnt.state = replace(learnt.state, replay=self._refreshed(), classes=self._classes())
        settled = self._settled(pair)
        learnt.state = replace(learnt.state, tasks=(*learnt.state.tasks, self._report(done, settled)))
        untold, told = _judged(self._experiment, learnt)
        learnt.state = replace(
            learnt.state,
            untold=(*learnt.state.untold, untold),
            told=(*learnt.state.told, told),
        )
        learnt.save(self._experiment)
        log.info("task_learnt", task=self._task.name, untold=untold, told=told)

    def _descend(self, pair: int, replay: Replayed | None, on_step: OnTaskStep | None) -> Descended:
        experiment, learnt, task = self._experiment, self._learnt, self._task
        learnt.train_only(self._weights(pair, replay))
        lesson = Lesson(
            rows=self._rows,
            held_out=[] if task.validation is None else learnt.subject.read(task.validation.data_url),
            pair=pair,
            among=self._number if experiment.softmax_over == "own" else None,
            replay=replay,
        )
        tuning = replace(experiment.tuning, seed=self._seed)
        course = Course(
            output=_directory(experiment, self._number),
            tuning=tuning,
            identity=_Identity(experiment=experiment.fingerprint(), task=self._data),
            validation=task.validation,
            checkpoint_every_steps=experiment.checkpoint_every_steps,
        )
        course.output.mkdir(parents=True, exist_ok=True)
        loss = TaskLoss(lesson, learnt.subject, learnt.nested, tuning)
        return Descent(course, learnt.nested.model, loss, _named(on_step, task.name)).to_the_end()

    def _weights(self, pair: int, replay: Replayed | None) -> list[nn.Parameter]:
        layers, trains = self._learnt.nested.layers.values(), self._experiment.trains
        slow = [weight for layer in layers for weight in layer.slow.parameters()] if trains != "fast" else []
        fast = [weight for layer in layers for weight in layer.fast[pair].parameters()] if trains != "slow" else []
        return [*slow, *fast, *self._head(replay)]

    def _head(self, replay: Replayed | None) -> list[nn.Parameter]:
        """The new classes' rows; old ones would only learn that they are never right, unless they are replayed."""
        subject = self._learnt.subject
        if not isinstance(subject, Images):
            return []
        parts = subject.head.parts[-1:] if replay is None else subject.head.parts
        return [weight for part in parts for weight in part.parameters()]

    def _replayed(self) -> Replayed | None:
        """To be asked before the task begins: the model is still the one of before."""
        spec, items, learnt = self._experiment.replay, self._learnt.state.replay, self._learnt
        if spec is None or not items:
            return None
        rows = replayed_rows(self._experiment, learnt, items)
        pairs = [learnt.state.pair_of(item.task) for item in items]
        return Replayed(
            spec=spec,
            rows=rows,
            pairs=[learnt.free_pair if pair is None else pair for pair in pairs],
            before=learnt.logits(rows) if spec.distil_weight else [],
        )

    def _refreshed(self) -> tuple[Item, ...]:
        spec, learnt = self._experiment.replay, self._learnt
        if spec is None:
            return ()
        draw = random.Random(self._seed)
        scores = learnt.row_nats(self._rows) if spec.choose == "nll" else [draw.random() for _ in self._rows]
        new = [
            Item(task=self._number, row=number, group=learnt.subject.group(row), score=score)
            for number, (row, score) in enumerate(zip(self._rows, scores, strict=True))
        ]
        return refreshed(learnt.state.replay, new, spec.items)

    def _settled(self, pair: int) -> Settled | None:
        experiment = self._experiment
        if experiment.consolidation is not None:
            return settle(experiment, self._learnt, self._number, experiment.consolidation)
        if experiment.trains == "slow":
            self._learnt.hold(pair, None)
        return None

    def _classes(self) -> tuple[tuple[int, ...], ...]:
        subject = self._learnt.subject
        return tuple(subject.classes) if isinstance(subject, Images) else ()

    def _report(self, done: Descended, settled: Settled | None) -> TaskReport:
        return TaskReport(
            name=self._task.name,
            data=self._data,
            steps=done.steps,
            stopped_why=done.stopped_why,
            losses_nats=done.losses_nats,
            best_validation_nats=done.best_validation_nats,
            seconds=done.seconds,
            consolidation=settled,
            parameters=self._learnt.parameters(),
        )


@dataclass(frozen=True, kw_only=True)
class _Identity:
    """What a checkpoint must agree with."""

    experiment: Digest
    task: Digest

    def notes(self) -> Mapping[str, str | None]:
        return asdict(self)

    def check(self, notes: Mapping[str, Any], path: Path) -> None:
        if {name: notes.get(name) for name in ("experiment", "task")} != self.notes():
            raise TrainingError(
                f"expected {path.name} of this experiment and task, got one of another, so training cannot go on",
                hint=f"delete {path.parent} to begin the task again",
            )


def _judged(experiment: NestedExperiment, learnt: NestedModel) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The share of each learnt task's test that is right: with no task named, and with it."""
    tasks = experiment.tasks[: len(learnt.state.tasks)]
    shares = [learnt.right(learnt.subject.read(task.test_url), number) for number, task in enumerate(tasks)]
    return tuple(untold for untold, _ in shares), tuple(told for _, told in shares)


def _directory(experiment: NestedExperiment, number: int) -> Path:
    return experiment.output / "tasks" / f"{number:03d}"


def _named(on_step: OnTaskStep | None, name: str) -> OnStep | None:
    return None if on_step is None else lambda step: on_step(name, step)


__all__ = ["NestedTrainer", "OnTaskStep"]
