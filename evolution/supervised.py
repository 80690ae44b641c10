"""The loss of a causal model's training: the answers, a teacher's distribution, and general text against forgetting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from evolution.errors import TrainingError
from evolution.fine_tuning import answer_logits
from evolution.training_data import Encoded, batches, encode_examples, examples_at, targets
from evolution.training_job import Replay, TrainingJob


class Answers:
    """Cross-entropy of the answers + w·KL(teacher ‖ adapted) + replay's cross-entropy and KL(bare base ‖ adapted).

    Each is a mean over its own tokens. Raises `TrainingError` for data or a teacher that do not fit.
    """

    def __init__(self, job: TrainingJob, adapted: Any, tokenizer: Any, *, teacher: Any = None) -> None:
        self._job, self._adapted, self._causal, self._teacher = job, adapted, adapted.get_base_model(), teacher
        self._check_teacher()
        tuning = job.tuning
        self._rows = self._read(tokenizer, job.data_url)
        self._batches = batches(len(self._rows), tuning.batch_size, tuning.steps, tuning.seed)
        self._held_out = [] if job.validation is None else self._read(tokenizer, job.validation.data_url)
        self._replay = [] if job.replay is None else self._read(tokenizer, job.replay.data_url)
        if job.replay is not None:
            size = max(1, round(job.replay.share * tuning.batch_size))
            self._replay_batches = batches(len(self._replay), size, tuning.steps, tuning.seed)

    def losses(self, step: int) -> Iterator[tuple[Tensor, float]]:
        """Parts of a step's loss, each with its share of the answers' own; one is let go of before the next is made."""
        rows = [self._rows[row] for row in self._batches[step]]
        for part, share in _parts(rows, self._job.accumulate):
            loss, own_nats = self._answered(part)
            yield share * loss, share * own_nats
        if self._job.replay is not None:
            replayed = [self._replay[row] for row in self._replay_batches[step]]
            for part, share in _parts(replayed, self._job.accumulate):
                yield share * self._replayed(part, self._job.replay), 0.0

    @torch.no_grad()
    def validation_nats(self) -> float:
        """Mean loss of the held-out answers' tokens."""
        size = self._job.tuning.batch_size
        total = 0.0
        for start in range(0, len(self._held_out), size):
            logits, wanted = self._logits(self._causal, self._held_out[start : start + size])
            total += functional.cross_entropy(logits, wanted, reduction="sum").item()
        return total / sum(map(targets, self._held_out))

    def _answered(self, rows: Sequence[Encoded]) -> tuple[Tensor, float]:
        logits, wanted = self._logits(self._causal, rows)
        own_nats = functional.cross_entropy(logits, wanted)
        return own_nats + self._distilled(logits, rows), own_nats.item()

    def _distilled(self, logits: Tensor, rows: Sequence[Encoded]) -> Tensor | float:
        if self._job.distillation is None:
            return 0.0
        with torch.no_grad():
            wanted, _ = self._logits(self._teacher, rows)
        return self._job.distillation.weight * divergence(wanted, logits)

    def _replayed(self, rows: Sequence[Encoded], replay: Replay) -> Tensor:
        bare = self._bare_logits(rows) if replay.kl_weight else None
        logits, wanted = self._logits(self._causal, rows)
        loss = replay.loss_weight * functional.cross_entropy(logits, wanted)
        return loss if bare is None else loss + replay.kl_weight * divergence(bare, logits)

    @torch.no_grad()
    def _bare_logits(self, rows: Sequence[Encoded]) -> Tensor:
        self._adapted.eval()
        with self._adapted.disable_adapter():
            logits, _ = self._logits(self._causal, rows)
        self._adapted.train()
        return logits

    def _logits(self, causal: Any, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        with mixed(causal, self._job):
            return answer_logits(causal, rows)

    def _read(self, tokenizer: Any, url: str) -> list[Encoded]:
        return encode_examples(self._causal, tokenizer, examples_at(url))

    def _check_teacher(self) -> None:
        if self._job.distillation is None:
            return
        known = self._causal.get_output_embeddings().weight.shape[0]
        given = None if self._teacher is None else self._teacher.get_output_embeddings().weight.shape[0]
        if given != known:
            raise TrainingError(
                f"expected a teacher model with a vocabulary of {known}, got {given}, so nothing can be compared"
            )


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference ‖ logits) of rows (n, vocabulary), their mean in nats."""
    return functional.kl_div(logits.log_softmax(-1), reference.log_softmax(-1), reduction="batchmean", log_target=True)


def mixed(model: Any, job: TrainingJob) -> torch.autocast:
    """The job's precision for a forward pass; weights and gradients of the adapter stay fp32."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=job.precision == "bfloat16")


def _parts(rows: Sequence[Encoded], count: int) -> Iterator[tuple[Sequence[Encoded], float]]:
    """`rows` in `count` parts, each with its share of the tokens that have a loss; shares × means sum to the mean."""
    total = sum(map(targets, rows))
    for first in range(min(count, len(rows))):
        part = rows[first::count]
        yield part, sum(map(targets, part)) / total


__all__ = ["Answers", "divergence", "mixed"]
