"""What is learnt task after task: images by class, or answers to prompts. Both come down to rows and their logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from evolution.errors import TrainingError
from evolution.fine_tuning import answer_logits
from evolution.growing_head import GrowingHead
from evolution.nested_data import Image, images_at
from evolution.training_data import Encoded, encode_examples, examples_at, targets

Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """Logits (n, choices) in fp32, the choice wanted at each, and the row (n,) that each belongs to."""

    logits: Tensor
    wanted: Tensor
    row: Tensor
    rows: int

    def loss(self) -> Tensor:
        """Mean cross-entropy of all choices, in nats."""
        return functional.cross_entropy(self.logits, self.wanted)

    def row_nats(self) -> Tensor:
        """Mean cross-entropy of each row's choices (rows,), in nats."""
        nats = functional.cross_entropy(self.logits, self.wanted, reduction="none")
        return self._summed(nats) / self._summed(torch.ones_like(nats))

    def right(self) -> Tensor:
        """Which rows (rows,) have every choice right; for text, whose greedy answer is the one wanted, to its end."""
        wrong = (self.logits.argmax(-1) != self.wanted).to(torch.float32)
        return self._summed(wrong) == 0

    def _summed(self, values: Tensor) -> Tensor:
        return torch.zeros(self.rows, device=values.device).index_add(0, self.row, values)


class Subject(Protocol[Row]):
    """Rows of one kind, and the model that is asked for them as it stands."""

    def read(self, url: str) -> list[Row]:
        """The rows of a task. Raises `TrainingError`."""

    def meet(self, rows: Sequence[Row]) -> None:
        """A new task begins: make room for what its rows want."""

    def scored(self, rows: Sequence[Row], task: int | None = None) -> Scored:
        """What the model says of the rows; with a task only its own classes compete."""

    def group(self, row: Row) -> int:
        """What replay keeps as much of as of others."""


class Images:
    """Rows are images; `model` takes `pixel_values`, and a head that grows has the place of its classifier."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._classifier: nn.Linear = model.classifier
        self.head = GrowingHead(model.classifier.in_features)
        self.classes: list[tuple[int, ...]] = []
        model.classifier = self.head

    def detach(self) -> None:
        """Give the model its own classifier back."""
        self._model.classifier = self._classifier

    def restore(self, classes: Sequence[tuple[int, ...]], weights: Mapping[str, Tensor]) -> None:
        """Have a head of these classes with these weights."""
        for labels in classes:
            self.head.grow(len(labels), like=self._classifier.weight)
        self.classes = list(classes)
        self.head.load_state_dict(weights)

    def read(self, url: str) -> list[Image]:
        """The images of an `.npz`."""
        config = self._model.config
        sides = (config.image_size,) * 2 if isinstance(config.image_size, int) else tuple(config.image_size)
        return images_at(url, (config.num_channels, *sides))

    def meet(self, rows: Sequence[Image]) -> None:
        """Grow the head by the labels that are new. Raises `TrainingError` where none is."""
        known = {label for part in self.classes for label in part}
        new = tuple(sorted({label for _, label in rows} - known))
        if not new:
            raise TrainingError(f"expected a task with new classes, got none beyond {sorted(known)}")
        self.classes.append(new)
        self.head.grow(len(new), like=self._classifier.weight)

    def scored(self, rows: Sequence[Image], task: int | None = None) -> Scored:
        """One choice a row. Raises `TrainingError` for a label that no task has brought."""
        device = self._classifier.weight.device
        pixels = torch.stack([pixels for pixels, _ in rows]).to(device, self._model.dtype)
        logits = self._model(pixel_values=pixels).logits.float()
        first = 0 if task is None else sum(map(len, self.classes[:task]))
        parts = self.classes if task is None else self.classes[task : task + 1]
        columns = {label: column for column, label in enumerate(label for part in parts for label in part)}
        odd = {label for _, label in rows} - columns.keys()
        if odd:
            raise TrainingError(f"expected labels among {sorted(columns)}, got {sorted(odd)}, so nothing can be right")
        wanted = torch.tensor([columns[label] for _, label in rows], device=device)
        return Scored(
            logits=logits[:, first : first + len(columns)],
            wanted=wanted,
            row=torch.arange(len(rows), device=device),
            rows=len(rows),
        )

    def group(self, row: Image) -> int:
        """Its class."""
        return row[1]


class Texts:
    """Rows are prompts with answers, as token ids; choices are the answers' tokens."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer

    def read(self, url: str) -> list[Encoded]:
        """The examples of a file of JSON lines."""
        return encode_examples(self._model, self._tokenizer, examples_at(url))

    def meet(self, rows: Sequence[Encoded]) -> None:
        """Nothing is to be done: the vocabulary is what it is."""

    def scored(self, rows: Sequence[Encoded], task: int | None = None) -> Scored:
        """A choice for each token of the answers; `task` changes nothing."""
        logits, wanted = answer_logits(self._model, rows)
        counts = torch.tensor([targets(row) for row in rows], device=logits.device)
        row = torch.arange(len(rows), device=logits.device).repeat_interleave(counts)
        return Scored(logits=logits, wanted=wanted, row=row, rows=len(rows))

    def group(self, row: Encoded) -> int:
        """All of a task are one group."""
        return 0


__all__ = ["Images", "Scored", "Subject", "Texts"]
