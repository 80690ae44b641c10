"""The loop of every training: steps, looks at held-out items that stop early, checkpoints to go on from, progress.

A descent that was killed goes on from its last checkpoint, and its losses are bit for bit those of one that was not, on
the same machine with as many threads. What it descends on is a `Loss`, what it moves is whatever of the model trains.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from evolution.checkpoint import CHECKPOINT, Checkpoint, read_checkpoint
from evolution.errors import TrainingError
from evolution.fine_tuning import Optimiser
from evolution.training_job import FineTuning, OnStep, Phase, ProgressLog, Step, StoppedWhy, Validation
from registry.logs import get_logger

log = get_logger(__name__)


class Loss(Protocol):
    """What a training descends on."""

    def losses(self, step: int) -> Iterator[tuple[Tensor, float]]:
        """Parts that sum to the step's loss, each with its share of the examples' own loss, in nats."""

    def validation_nats(self) -> float:
        """The loss of the held-out examples."""


class Identity(Protocol):
    """Whose descent it is."""

    def notes(self) -> Mapping[str, str | None]:
        """What a checkpoint says of it."""

    def check(self, notes: Mapping[str, Any], path: Path) -> None:
        """Raise `TrainingError` where the notes of the checkpoint at `path` are another's."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """How far a descent goes, when it looks, and the directory of its checkpoint and its `progress.jsonl`."""

    output: Path
    tuning: FineTuning
    identity: Identity
    validation: Validation | None = None
    checkpoint_every_steps: int = 25


@dataclass(frozen=True, kw_only=True)
class Descended:
    """`losses_nats` has the examples' own loss of each step, `seconds` those of all processes that took part."""

    best_validation_nats: float | None
    losses_nats: tuple[float, ...]
    stopped_why: StoppedWhy
    seconds: float

    @property
    def steps(self) -> int:
        """How many were taken."""
        return len(self.losses_nats)


@dataclass(kw_only=True)
class _State:
    """What JSON can say of a descent; its step is the number of losses."""

    losses_nats: list[float] = field(default_factory=list)
    best_nats: float | None = None
    misses: int = 0
    seconds: float = 0.0


class Descent:
    """Moves those weights of `model` that require a gradient, in place; `model` has a device and two modes."""

    def __init__(self, course: Course, model: Any, loss: Loss, on_step: OnStep | None = None) -> None:
        self._course, self._model, self._loss = course, model, loss
        self._on_step, self._progress = on_step, ProgressLog(course.output)
        self._optimiser = Optimiser(model, course.tuning)
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._best: dict[str, Tensor] = {}
        self._state = _State()

    def to_the_end(self) -> Descended:
        """Descend, or go on; the best look's weights stay in the model, which is left in eval mode.

        The checkpoint stays until `forget`, so that what comes after the end may be cut short as well. Raises
        `TrainingError`.
        """
        self._resume()
        state, began_s = self._state, time.perf_counter() - self._state.seconds
        self._model.train()
        while (why := self._stopped()) is None:
            self._descend()
            if self._looks():
                self._look()
            state.seconds = time.perf_counter() - began_s
            if len(state.losses_nats) % self._course.checkpoint_every_steps == 0:
                self._save()
        self._model.eval()
        self._set(self._best)
        return Descended(
            best_validation_nats=state.best_nats,
            losses_nats=tuple(state.losses_nats),
            stopped_why=why,
            seconds=state.seconds,
        )

    def _stopped(self) -> StoppedWhy | None:
        validation = self._course.validation
        if validation is not None and self._state.misses >= validation.patience:
            return "patience"
        return "steps" if len(self._state.losses_nats) >= self._course.tuning.steps else None

    def _descend(self) -> None:
        step, loss_nats = len(self._state.losses_nats), 0.0
        for part, own_nats in self._loss.losses(step):
            torch.autograd.backward(part)
            loss_nats += own_nats if math.isfinite(part.item()) else math.nan
        if not math.isfinite(loss_nats):
            raise TrainingError(
                f"expected a finite loss, got {loss_nats} at step {step + 1}, so the adapter is of no use",
                hint="train with a lower learning rate, or in float32",
            )
        self._optimiser.descend()
        self._state.losses_nats.append(loss_nats)
        self._tell("train", loss_nats)

    def _looks(self) -> bool:
        validation, step = self._course.validation, len(self._state.losses_nats)
        return validation is not None and (step % validation.every_steps == 0 or step == self._course.tuning.steps)

    def _look(self) -> None:
        self._model.eval()
        nats = self._loss.validation_nats()
        self._model.train()
        self._tell("validate", nats)
        if self._state.best_nats is None or nats < self._state.best_nats:
            self._state.best_nats, self._state.misses = nats, 0
            self._best = {name: weight.detach().clone() for name, weight in self._weights.items()}
        else:
            self._state.misses += 1

    def _tell(self, phase: Phase, loss_nats: float) -> None:
        taken = len(self._state.losses_nats)
        step = Step(phase=phase, step=taken, steps=self._course.tuning.steps, loss_nats=loss_nats)
        self._progress.append(step)
        if self._on_step is not None:
            self._on_step(step)

    def _save(self) -> None:
        Checkpoint(
            tensors={
                "adapter": self._weights,
                "best": self._best,
                "optimiser": self._optimiser.moments(),
                "random": _random_states(self._model.device),
            },
            notes={**self._course.identity.notes(), "state": asdict(self._state)},
        ).write(self._course.output / CHECKPOINT)

    def _resume(self) -> None:
        path = self._course.output / CHECKPOINT
        checkpoint = read_checkpoint(path)
        if checkpoint is None:
            return
        self._course.identity.check(checkpoint.notes, path)
        self._state = _State(**checkpoint.notes["state"])
        self._set(checkpoint.tensors["adapter"])
        self._best = dict(checkpoint.tensors.get("best", {}))
        self._optimiser.resume(checkpoint.tensors["optimiser"], len(self._state.losses_nats))
        _set_random_states(checkpoint.tensors["random"], self._model.device)
        log.info("training_resumed", step=len(self._state.losses_nats))

    @torch.no_grad()
    def _set(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            self._weights[name].copy_(weight)


def forget(output: Path) -> None:
    """Drop the checkpoint of a descent whose result is kept elsewhere."""
    (output / CHECKPOINT).unlink(missing_ok=True)


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """Dropout draws from the device's generator."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


__all__ = ["Course", "Descended", "Descent", "Identity", "Loss", "forget"]
