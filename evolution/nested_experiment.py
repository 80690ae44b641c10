"""A training of task after task as one YAML file. Nothing heavy is imported; `evolution.nested_trainer` runs it.

    base: {model: ./vit, name: maker/vit}
    kind: image
    output_url: runs/digits
    tasks:
      - {name: zero-one, data_url: 01.npz, test_url: 01-test.npz}
      - {name: two-three, data_url: 23.npz, test_url: 23-test.npz}
    tuning: {rank: 8, steps: 60}
    consolidation: {rank: 16}
    replay: {items: 40}

A path without a scheme is seen from the file's directory. Tasks may be added at the end of a file later on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from evolution.errors import TrainingError
from evolution.training_job import Count, FineTuning, ModelSpec, Url, Validation, Weight, bytes_at, path_of
from registry.digest import Digest, digest_of
from registry.files import written_whole

TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
EXPERIMENT: Final = "experiment.json"
"""In the output directory: what was trained there."""
_URLS: Final = ("data_url", "test_url", "output_url")


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NestedTask(_Spec):
    """What is learnt, and what tells afterwards how well; `validation` stops early and guards the consolidations."""

    name: TaskName
    data_url: Url
    test_url: Url
    validation: Validation | None = None

    def digest(self) -> Digest:
        """Of the task and its data. Raises `TrainingError` where data is missing."""
        urls = [self.data_url, self.test_url] + ([] if self.validation is None else [self.validation.data_url])
        looks = None if self.validation is None else [self.validation.every_steps, self.validation.patience]
        data = [digest_of(bytes_at(url)) for url in urls]
        return digest_of(json.dumps([self.name, looks, data]).encode())


class ConsolidationSpec(_Spec):
    """`evolution.consolidation.Consolidation`, and how much right of what is looked at it may cost, as a share.

    Looked at are the validation items of all tasks so far, or what replay has of a task without any. A consolidation
    that costs more is rolled back; None keeps all.
    """

    slow: float = 1.0
    fast: float = 1.0
    left: float = 0.0
    rank: Count | None = None
    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    intruders: Annotated[float, Field(ge=0, le=1)] = 1.0
    tolerance: Annotated[float, Field(ge=0, le=1)] | None = 0.05


class ReplaySpec(_Spec):
    """Items of earlier tasks in every step, `share` for each of the batch: `items` are kept in all, however many tasks.

    "nll" keeps those with the highest loss (SuRe, arXiv:2511.22367) of the model that has learnt the task.
    `distil_weight` is that of KL(model before the task ‖ model) on them.
    """

    items: Count
    choose: Literal["nll", "random"] = "nll"
    share: Annotated[float, Field(gt=0, le=4)] = 0.5
    loss_weight: Weight = 1.0
    distil_weight: Weight = 0.0


class NestedExperiment(_Spec):
    """Tasks one after another on one base. `kind` says what the data is.

    image: `.npz` of `images` (n, h, w) or (n, c, h, w) and `labels` (n,); the head grows by the classes of each task.
    text: JSON lines of `prompt` and `answer`.
    `trains` says which pairs learn; `combine` what inference does with the fast pairs that are not consolidated;
    `softmax_over` whether new images compete with all classes seen, or with their task's only (ER-ACE, 2104.05025).
    """

    format: Literal["arrowmoe.nested"] = "arrowmoe.nested"
    version: Literal[1] = 1
    base: ModelSpec
    kind: Literal["image", "text"]
    tasks: Annotated[tuple[NestedTask, ...], Field(min_length=1)]
    tuning: FineTuning
    output_url: Url
    trains: Literal["both", "slow", "fast"] = "both"
    combine: Literal["sum", "mean"] = "sum"
    softmax_over: Literal["seen", "own"] = "seen"
    consolidation: ConsolidationSpec | None = ConsolidationSpec()
    replay: ReplaySpec | None = None
    checkpoint_every_steps: Count = 25

    @field_validator("tasks")
    @classmethod
    def _names_differ(cls, tasks: tuple[NestedTask, ...]) -> tuple[NestedTask, ...]:
        names = [task.name for task in tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"each task needs a name of its own, got {names}")
        return tasks

    @model_validator(mode="after")
    def _something_is_consolidated(self) -> Self:
        if self.trains == "slow" and self.consolidation is not None:
            raise ValueError('with trains "slow" fast pairs stay empty, so consolidation must be null')
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """The experiment of a YAML file. Raises `TrainingError`."""
        try:
            said = yaml.safe_load(path.read_text(encoding="utf-8"))
            return cls.model_validate(_resolved(said, path.resolve().parent))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
            raise TrainingError(f"expected an experiment in {path.name}, so nothing is trained: {error}") from error

    @classmethod
    def of(cls, output: Path) -> Self:
        """What was trained in an output directory, wherever that is now. Raises `TrainingError`."""
        return cls.load(output / EXPERIMENT).model_copy(update={"output_url": output.resolve().as_uri()})

    def save(self, path: Path) -> None:
        """Write it, whole or not at all; `load` reads it, for JSON is YAML."""
        with written_whole(path) as file:
            file.write(self.model_dump_json(indent=2).encode() + b"\n")

    @property
    def output(self) -> Path:
        """The output directory on this machine. Raises `TrainingError`."""
        return path_of(self.output_url)

    def fingerprint(self) -> Digest:
        """Of all but the tasks, and of where it runs and writes: what may go on from a state."""
        settings = self.model_dump(mode="json", exclude={"output_url": True, "tasks": True, "base": {"device"}})
        return digest_of(json.dumps(settings, sort_keys=True).encode())


def _resolved(said: Any, directory: Path) -> Any:
    """`said` with paths as URLs."""
    if isinstance(said, list):
        return [_resolved(one, directory) for one in said]
    if not isinstance(said, dict):
        return said
    return {key: _url(value, directory) if key in _URLS else _resolved(value, directory) for key, value in said.items()}


def _url(value: Any, directory: Path) -> Any:
    if not isinstance(value, str) or ":" in value:
        return value
    return (directory / value).as_uri()


__all__ = ["EXPERIMENT", "ConsolidationSpec", "NestedExperiment", "NestedTask", "ReplaySpec"]
