"""Training jobs for tiny models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evolution.examples import write_examples
from evolution.protocols import Example
from evolution.training_job import FineTuning, ModelSpec, TrainingJob

EXAMPLES = [Example(prompt=f"w40 w{index}", answer=f"w{index + 20}") for index in range(3, 15)]
TEXTS = [Example(prompt="", answer=f"w{index} w{index + 1} w{index + 3} w{index + 7}") for index in range(3, 33, 3)]
LABELLED = [Example(prompt=f"w{index} w{50 + index % 3}", answer=f"label {index % 3}") for index in range(3, 27)]


def data(directory: Path, name: str, examples: Sequence[Example]) -> str:
    """A URL of `examples`."""
    path = directory / f"{name}.jsonl"
    write_examples(path, examples)
    return path.as_uri()


def tuning(**changes: Any) -> FineTuning:
    """Few steps of a small adapter."""
    return FineTuning(**{"rank": 4, "steps": 12, "batch_size": 4, "learning_rate": 2e-2, "warmup_steps": 2} | changes)


def job(directory: Path, output: str = "out", **changes: Any) -> TrainingJob:
    """A job on `EXAMPLES` for the tiny causal model."""
    fields = {
        "base": ModelSpec(model="tiny", name="maker/tiny", device="cpu"),
        "objective": "sft",
        "tuning": tuning(),
        "data_url": data(directory, "data", EXAMPLES),
        "output_url": (directory / output).as_uri(),
    }
    return TrainingJob(**fields | changes)
