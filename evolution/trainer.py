"""Trains the expert of a job: validation that stops early, checkpoints to go on from, an adapter at the end.

A run that was killed goes on from its last checkpoint, and its losses are bit for bit those of a run that was not, on
the same machine with as many threads. A finished job is not trained again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from evolution.checkpoint import CHECKPOINT, Checkpoint, read_checkpoint
from evolution.contrastive import Contrast, Embed
from evolution.errors import TrainingError
from evolution.fine_tuning import Optimiser, attach, save_bf16
from evolution.planning import planned
from evolution.supervised import Answers
from evolution.target_plan import PLAN, Plan
from evolution.training_job import (
    ADAPTER,
    OnStep,
    Phase,
    ProgressLog,
    Step,
    StoppedWhy,
    Trained,
    TrainingJob,
    read_trained,
    same_job,
    write_trained,
)
from registry.digest import Digest
from registry.logs import get_logger

TASK_TYPES: Final = {"sft": "CAUSAL_LM", "contrastive": "FEATURE_EXTRACTION"}

log = get_logger(__name__)


class Loss(Protocol):
    """What a training descends on."""

    def losses(self, step: int) -> Iterator[tuple[Tensor, float]]:
        """Parts that sum to the step's loss, each with its share of the examples' own loss, in nats."""

    def validation_nats(self) -> float:
        """The loss of the held-out examples."""


class ExpertTrainer:
    """Trains a LoRA for a base model as a job says, and leaves the base model as it was.

    `embed` is how an encoder's texts become vectors, `teacher` the loaded model of a job with distillation.
    """

    def __init__(
        self, job: TrainingJob, model: Any, tokenizer: Any, *, embed: Embed | None = None, teacher: Any = None
    ) -> None:
        self._job, self._model, self._tokenizer = job, model, tokenizer
        self._embed, self._teacher = embed, teacher

    def run(self, on_step: OnStep | None = None) -> Trained:
        """Train, or go on with what was begun in the job's output directory. Raises `TrainingError`."""
        job, fingerprint = self._job, self._job.fingerprint()
        job.output.mkdir(parents=True, exist_ok=True)
        done = read_trained(job.output, fingerprint)
        if done is not None:
            return done
        plan = planned(job, self._model, self._tokenizer, fingerprint)
        adapted = attach(
            self._model,
            job.tuning if plan is None else plan.tuning(job.tuning),
            base_name=job.base.name,
            task_type=TASK_TYPES[job.objective],
            rank_pattern=job.rank_pattern if plan is None else plan.rank_pattern(job.tuning),
        )
        try:
            return _Run(job, adapted, self._loss(adapted), _Identity.of(fingerprint, plan), on_step).to_the_end()
        finally:
            adapted.unload().eval()

    def _loss(self, adapted: Any) -> Loss:
        if self._job.objective == "sft":
            return Answers(self._job, adapted, self._tokenizer, teacher=self._teacher)
        if self._embed is None:
            raise TrainingError("expected a way to embed texts for a contrastive job, got none")
        return Contrast(self._job, adapted, self._embed)


@dataclass(kw_only=True)
class _State:
    """What JSON can say of a run; its step is the number of losses."""

    losses_nats: list[float] = field(default_factory=list)
    best_nats: float | None = None
    misses: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Identity:
    """What a checkpoint must agree with."""

    job: Digest
    plan: Digest | None

    @classmethod
    def of(cls, fingerprint: Digest, plan: Plan | None) -> _Identity:
        return cls(job=fingerprint, plan=None if plan is None else plan.digest())

    def check(self, notes: Mapping[str, Any], path: Path) -> None:
        same_job(notes["job"], self.job, path)
        if notes["plan"] != self.plan:
            raise TrainingError(
                f"expected {path.name} of the plan in {PLAN}, got one of another, so training cannot go on from it",
                hint=f"delete {path.parent} to begin again",
            )


class _Run:
    def __init__(self, job: TrainingJob, adapted: Any, loss: Loss, identity: _Identity, on_step: OnStep | None) -> None:
        self._job, self._adapted, self._loss, self._identity = job, adapted, loss, identity
        self._on_step, self._progress = on_step, ProgressLog(job.output)
        self._optimiser = Optimiser(adapted, job.tuning)
        self._weights = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
        self._best: dict[str, Tensor] = {}
        self._state = _State()

    def to_the_end(self) -> Trained:
        self._resume()
        state, began_s = self._state, time.perf_counter() - self._state.seconds
        self._adapted.train()
        while (why := self._stopped()) is None:
            self._descend()
            if self._validates():
                self._validate()
            state.seconds = time.perf_counter() - began_s
            if len(state.losses_nats) % self._job.checkpoint_every_steps == 0:
                self._save()
        return self._finish(why)

    def _stopped(self) -> StoppedWhy | None:
        validation = self._job.validation
        if validation is not None and self._state.misses >= validation.patience:
            return "patience"
        return "steps" if len(self._state.losses_nats) >= self._job.tuning.steps else None

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

    def _validates(self) -> bool:
        validation, step = self._job.validation, len(self._state.losses_nats)
        return validation is not None and (step % validation.every_steps == 0 or step == self._job.tuning.steps)

    def _validate(self) -> None:
        self._adapted.eval()
        nats = self._loss.validation_nats()
        self._adapted.train()
        self._tell("validate", nats)
        if self._state.best_nats is None or nats < self._state.best_nats:
            self._state.best_nats, self._state.misses = nats, 0
            self._best = {name: weight.detach().clone() for name, weight in self._weights.items()}
        else:
            self._state.misses += 1

    def _tell(self, phase: Phase, loss_nats: float) -> None:
        taken = len(self._state.losses_nats)
        step = Step(phase=phase, step=taken, steps=self._job.tuning.steps, loss_nats=loss_nats)
        self._progress.append(step)
        if self._on_step is not None:
            self._on_step(step)

    def _save(self) -> None:
        Checkpoint(
            tensors={
                "adapter": self._weights,
                "best": self._best,
                "optimiser": self._optimiser.moments(),
                "random": _random_states(self._adapted.device),
            },
            notes=asdict(self._identity) | {"state": asdict(self._state)},
        ).write(self._job.output)

    def _resume(self) -> None:
        checkpoint = read_checkpoint(self._job.output)
        if checkpoint is None:
            return
        self._identity.check(checkpoint.notes, self._job.output / CHECKPOINT)
        self._state = _State(**checkpoint.notes["state"])
        self._set(checkpoint.tensors["adapter"])
        self._best = dict(checkpoint.tensors.get("best", {}))
        self._optimiser.resume(checkpoint.tensors["optimiser"], len(self._state.losses_nats))
        _set_random_states(checkpoint.tensors["random"], self._adapted.device)
        log.info("training_resumed", step=len(self._state.losses_nats))

    def _finish(self, why: StoppedWhy) -> Trained:
        self._adapted.eval()
        self._set(self._best)
        trained = Trained(
            adapter_dir=self._job.output / ADAPTER,
            steps=len(self._state.losses_nats),
            best_validation_nats=self._state.best_nats,
            losses_nats=tuple(self._state.losses_nats),
            stopped_why=why,
            seconds=self._state.seconds,
        )
        save_bf16(self._adapted, trained.adapter_dir)
        write_trained(trained, self._identity.job)
        (self._job.output / CHECKPOINT).unlink(missing_ok=True)
        log.info("training_ended", steps=trained.steps, why=why, validation_nats=trained.best_validation_nats)
        return trained

    @torch.no_grad()
    def _set(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            self._weights[name].copy_(weight)


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """Dropout draws from the device's generator."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


__all__ = ["ExpertTrainer", "Loss"]
