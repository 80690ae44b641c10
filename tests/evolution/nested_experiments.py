"""Experiments of task after task that take a second: digits for the tiny ViT, words for the tiny Llama."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from evolution.nested_experiment import ConsolidationSpec, NestedExperiment, NestedTask, ReplaySpec
from evolution.protocols import Example
from evolution.training_job import FineTuning, ModelSpec, Validation
from tests.evolution.jobs import data

PAIRS = ((0, 1), (2, 3), (4, 5))
TUNING = FineTuning(rank=4, alpha=8, steps=30, batch_size=8, learning_rate=1e-2, warmup_steps=2)
TESTED = 40
"""Images of each task that only test."""


def images_of(directory: Path, digits: Sequence[int], name: str) -> NestedTask:
    """The task of telling `digits` apart, 8 × 8 as they are."""
    found = load_digits()
    chosen = np.isin(found.target, digits)
    pixels, labels = (found.images[chosen] / 16).astype(np.float32), found.target[chosen]
    parts = {"test": slice(0, TESTED), "validation": slice(TESTED, 60), "data": slice(60, 160)}
    for part, rows in parts.items():
        np.savez(directory / f"{name}-{part}.npz", images=pixels[rows], labels=labels[rows])
    urls = {part: (directory / f"{name}-{part}.npz").as_uri() for part in parts}
    return NestedTask(
        name=name,
        data_url=urls["data"],
        test_url=urls["test"],
        validation=Validation(data_url=urls["validation"], every_steps=10, patience=9),
    )


def words_of(directory: Path, task: int) -> NestedTask:
    """Prompts of task k all begin with w(40 + k), and each has another answer than in other tasks."""
    examples = [Example(prompt=f"w{40 + task} w{n}", answer=f"w{20 + (n + 5 * task) % 15}") for n in range(3, 11)]
    url = data(directory, f"words-{task}", examples)
    return NestedTask(name=f"words-{task}", data_url=url, test_url=url)


def image_experiment(directory: Path, output: str = "out", *, tasks: int = 2, **changes: Any) -> NestedExperiment:
    made = [images_of(directory, pair, f"digits-{pair[0]}{pair[1]}") for pair in PAIRS[:tasks]]
    return _experiment("image", made, directory / output, changes)


def text_experiment(directory: Path, output: str = "out", *, tasks: int = 2, **changes: Any) -> NestedExperiment:
    return _experiment("text", [words_of(directory, task) for task in range(tasks)], directory / output, changes)


def _experiment(kind: str, tasks: Sequence[NestedTask], output: Path, changes: dict[str, Any]) -> NestedExperiment:
    fields = {
        "base": ModelSpec(model="tiny", name="maker/tiny", device="cpu"),
        "kind": kind,
        "tasks": tuple(tasks),
        "tuning": TUNING,
        "output_url": output.as_uri(),
        "consolidation": ConsolidationSpec(rank=8),
        "replay": ReplaySpec(items=24, distil_weight=0.5),
        "checkpoint_every_steps": 7,
    }
    return NestedExperiment(**fields | changes)
