"""The loss of one task on slow and fast: its own items, and replayed ones of earlier tasks.

CE(own) + w · CE(replayed) + d · KL(model before the task ‖ model) on the replayed, over the choices of before
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evolution.nested import NestedLoRA
from evolution.nested_experiment import ReplaySpec
from evolution.nested_subjects import Scored, Subject
from evolution.supervised import divergence
from evolution.training_data import batches
from evolution.training_job import FineTuning


@dataclass(frozen=True, kw_only=True, eq=False)
class Replayed:
    """Rows of earlier tasks, the fast pair that answers each, and the logits of the model before (empty: unused)."""

    spec: ReplaySpec
    rows: Sequence[Any]
    pairs: Sequence[int]
    before: Sequence[Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """A task as it is trained: its rows, held-out ones, its fast pair, and with `among` whose classes compete."""

    rows: Sequence[Any]
    held_out: Sequence[Any]
    pair: int
    among: int | None
    replay: Replayed | None


class TaskLoss:
    """A `descent.Loss`."""

    def __init__(self, lesson: Lesson, subject: Subject[Any], nested: NestedLoRA, tuning: FineTuning) -> None:
        self._lesson, self._subject, self._nested, self._tuning = lesson, subject, nested, tuning
        self._batches = batches(len(lesson.rows), tuning.batch_size, tuning.steps, tuning.seed)
        if lesson.replay is not None:
            size = max(1, round(lesson.replay.spec.share * tuning.batch_size))
            self._replay_batches = batches(len(lesson.replay.rows), size, tuning.steps, tuning.seed)

    def losses(self, step: int) -> Iterator[tuple[Tensor, float]]:
        """The task's own loss, then that of replay, which is not counted as its own."""
        lesson = self._lesson
        with self._nested.using(lesson.pair):
            loss = self._subject.scored([lesson.rows[row] for row in self._batches[step]], lesson.among).loss()
            yield loss, loss.item()
        if lesson.replay is not None:
            chosen = self._replay_batches[step]
            with self._nested.using(_task_of([lesson.replay.pairs[row] for row in chosen])):
                yield self._replayed(lesson.replay, chosen), 0.0

    @torch.no_grad()
    def validation_nats(self) -> float:
        """Mean loss of the held-out rows."""
        size, rows = self._tuning.batch_size, self._lesson.held_out
        with self._nested.using(self._lesson.pair):
            parts = [
                self._subject.scored(rows[start : start + size], self._lesson.among).row_nats()
                for start in range(0, len(rows), size)
            ]
        return torch.cat(parts).mean().item()

    def _replayed(self, replay: Replayed, chosen: Sequence[int]) -> Tensor:
        scored = self._subject.scored([replay.rows[row] for row in chosen])
        loss = replay.spec.loss_weight * scored.loss()
        if not replay.spec.distil_weight:
            return loss
        before = torch.cat([replay.before[row] for row in chosen])
        return loss + replay.spec.distil_weight * divergence(before, scored.logits[:, : before.shape[1]])


def _task_of(pairs: Sequence[int]) -> int | Tensor:
    """What is the same for all rows is cheaper than row by row."""
    return pairs[0] if len(set(pairs)) == 1 else torch.tensor(pairs)


def logits_by_row(scored: Scored) -> list[Tensor]:
    """The logits of each row, (its choices, choices to choose from)."""
    return list(torch.split(scored.logits, torch.bincount(scored.row, minlength=scored.rows).tolist()))


__all__ = ["Lesson", "Replayed", "TaskLoss", "logits_by_row"]
