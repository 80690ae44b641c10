"""Trains the expert of a job by `evolution.descent`, an adapter at the end. A finished job is not trained again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from evolution.contrastive import Contrast, Embed
from evolution.descent import Course, Descended, Descent, Loss, forget
from evolution.errors import TrainingError
from evolution.fine_tuning import attach, save_bf16
from evolution.planning import planned
from evolution.supervised import Answers
from evolution.target_plan import PLAN
from evolution.training_job import ADAPTER, OnStep, Trained, TrainingJob, read_trained, same_job, write_trained
from registry.digest import Digest
from registry.logs import get_logger

TASK_TYPES: Final = {"sft": "CAUSAL_LM", "contrastive": "FEATURE_EXTRACTION"}

log = get_logger(__name__)


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
        course = Course(
            output=job.output,
            tuning=job.tuning,
            identity=_Identity(job=fingerprint, plan=None if plan is None else plan.digest()),
            validation=job.validation,
            checkpoint_every_steps=job.checkpoint_every_steps,
        )
        try:
            return self._kept(adapted, Descent(course, adapted, self._loss(adapted), on_step).to_the_end(), fingerprint)
        finally:
            adapted.unload().eval()

    def _kept(self, adapted: Any, done: Descended, fingerprint: Digest) -> Trained:
        trained = Trained(
            adapter_dir=self._job.output / ADAPTER,
            steps=done.steps,
            best_validation_nats=done.best_validation_nats,
            losses_nats=done.losses_nats,
            stopped_why=done.stopped_why,
            seconds=done.seconds,
        )
        save_bf16(adapted, trained.adapter_dir)
        write_trained(trained, fingerprint)
        forget(self._job.output)
        log.info(
            "training_ended",
            steps=trained.steps,
            why=trained.stopped_why,
            validation_nats=trained.best_validation_nats,
        )
        return trained

    def _loss(self, adapted: Any) -> Loss:
        if self._job.objective == "sft":
            return Answers(self._job, adapted, self._tokenizer, teacher=self._teacher)
        if self._embed is None:
            raise TrainingError("expected a way to embed texts for a contrastive job, got none")
        return Contrast(self._job, adapted, self._embed)


@dataclass(frozen=True, kw_only=True)
class _Identity:
    """What a checkpoint must agree with."""

    job: Digest
    plan: Digest | None

    def notes(self) -> Mapping[str, str | None]:
        return asdict(self)

    def check(self, notes: Mapping[str, Any], path: Path) -> None:
        same_job(notes["job"], self.job, path)
        if notes["plan"] != self.plan:
            raise TrainingError(
                f"expected {path.name} of the plan in {PLAN}, got one of another, so training cannot go on from it",
                hint=f"delete {path.parent} to begin again",
            )


__all__ = ["ExpertTrainer"]
