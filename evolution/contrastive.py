"""The loss of an encoder's training: in-batch supervised contrast, where texts of one label attract each other.

How tokens become one vector is the base model's own affair, so whoever loaded it gives `embed`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from evolution.errors import TrainingError
from evolution.protocols import Example
from evolution.supervised import mixed
from evolution.training_data import examples_at
from evolution.training_job import TrainingJob

TEMPERATURE: Final = 0.1

Embed = Callable[[Sequence[str]], Tensor]
"""Texts → unit rows (n, d), through which gradients flow."""


class Contrast:
    """Supervised contrastive loss of examples whose answers are labels. Raises `TrainingError` for unfit data."""

    def __init__(self, job: TrainingJob, adapted: Any, embed: Embed) -> None:
        self._job, self._adapted, self._embed = job, adapted, embed
        self._batches = list(_batches(_read(job.data_url), job))
        self._held_out = [] if job.validation is None else _read(job.validation.data_url)

    def losses(self, step: int) -> Iterator[tuple[Tensor, float]]:
        """The step's loss, which is one part."""
        loss_nats = self._loss(self._batches[step], self._vectors(self._batches[step]))
        yield loss_nats, loss_nats.item()

    @torch.no_grad()
    def validation_nats(self) -> float:
        """The loss of all held-out texts as one batch."""
        size = self._job.tuning.batch_size
        chunks = (self._held_out[start : start + size] for start in range(0, len(self._held_out), size))
        return self._loss(self._held_out, torch.cat([self._vectors(chunk) for chunk in chunks])).item()

    def _vectors(self, rows: Sequence[Example]) -> Tensor:
        with mixed(self._adapted.get_base_model(), self._job):
            return self._embed([row.prompt for row in rows]).float()

    def _loss(self, rows: Sequence[Example], vectors: Tensor) -> Tensor:
        numbers = {label: number for number, label in enumerate(sorted({row.answer for row in rows}))}
        labels = torch.tensor([numbers[row.answer] for row in rows], device=vectors.device)
        return supervised_contrast(vectors, labels)


def supervised_contrast(vectors: Tensor, labels: Tensor, *, temperature: float = TEMPERATURE) -> Tensor:
    """Mean over the rows with a positive of −mean log softmax of its positives, in nats.

    Khosla et al. 2020 (arXiv:2004.11362), equation 2. `vectors` (batch, d) of unit length, `labels` (batch,); a row
    that is alone with its label is a negative only.
    """
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    similarity = (vectors @ vectors.T / temperature).masked_fill(own, float("-inf"))
    log_share = similarity.log_softmax(dim=1).masked_fill(own, 0.0)
    positive = (labels[:, None] == labels[None, :]) & ~own
    counts = positive.sum(dim=1)
    anchors = counts > 0
    return -((log_share * positive).sum(dim=1)[anchors] / counts[anchors]).mean()


def _batches(examples: Sequence[Example], job: TrainingJob) -> Iterator[list[Example]]:
    """The examples of each step: as many labels as fit twice, each equally often where it has enough texts."""
    rng, size = random.Random(job.tuning.seed), job.tuning.batch_size
    groups = _by_label(examples)
    labels = min(len(groups), max(2, size // 2))
    for _ in range(job.tuning.steps):
        chosen = _chosen(groups, labels, rng)
        each = max(2, size // labels)
        yield [row for label in chosen for row in rng.sample(groups[label], min(each, len(groups[label])))]


def _chosen(groups: dict[str, list[Example]], count: int, rng: random.Random) -> list[str]:
    """`count` labels, the first of them with a pair of texts, so that every batch has a positive."""
    first = rng.choice([label for label, rows in groups.items() if len(rows) > 1])
    return [first, *rng.sample([label for label in groups if label != first], count - 1)]


def _read(url: str) -> list[Example]:
    examples = examples_at(url)
    groups = _by_label(examples)
    if len(groups) < 2 or max(map(len, groups.values())) < 2:
        raise TrainingError(
            f"expected two labels or more and one of them twice at {url}, got {len(examples)} texts of {len(groups)}, "
            "so there is nothing to attract or to repel"
        )
    return examples


def _by_label(examples: Sequence[Example]) -> dict[str, list[Example]]:
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.answer, []).append(example)
    return groups


__all__ = ["TEMPERATURE", "Contrast", "Embed", "supervised_contrast"]
