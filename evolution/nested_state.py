"""How far an experiment of task after task is: `nested.json`, for whoever looks, without anything heavy.

The weights, and this once more, are in `nested.safetensors`, which counts: it is replaced whole at each task's end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from evolution.continual_measures import Measures, measures
from evolution.errors import TrainingError
from evolution.replay_buffer import Item
from evolution.training_job import StoppedWhy
from registry.digest import Digest
from registry.files import written_whole

STATE: Final = "nested.json"
WEIGHTS: Final = "nested.safetensors"


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What became of a consolidation: the largest rank of slow, and the largest share of energy that was cut.

    `right_before` and `right_after` are shares of what was looked at, None where nothing was.
    """

    kept: bool
    rank: int
    lost_energy: float
    right_before: float | None
    right_after: float | None


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """A task that was learnt; `data` is the digest of it, `parameters` those of all pairs and the head after it."""

    name: str
    data: Digest
    steps: int
    stopped_why: StoppedWhy
    losses_nats: tuple[float, ...]
    best_validation_nats: float | None
    seconds: float
    consolidation: Settled | None
    parameters: int


@dataclass(frozen=True, kw_only=True)
class NestedState:
    """After some tasks: accuracies[after task][of task] with no task named and with it, and what the next task needs.

    `held` has for each fast pair the task that still needs it, `classes` the labels of each part of the head.
    """

    experiment: Digest
    tasks: tuple[TaskReport, ...] = ()
    untold: tuple[tuple[float, ...], ...] = ()
    told: tuple[tuple[float, ...], ...] = ()
    held: tuple[int | None, ...] = (None,)
    classes: tuple[tuple[int, ...], ...] = ()
    replay: tuple[Item, ...] = ()

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Self:
        """From `asdict`, or from JSON. Raises `KeyError`, `TypeError` or `ValueError` for what is none."""
        return cls(
            experiment=said["experiment"],
            tasks=tuple(_report(one) for one in said["tasks"]),
            untold=tuple(map(tuple, said["untold"])),
            told=tuple(map(tuple, said["told"])),
            held=tuple(said["held"]),
            classes=tuple(map(tuple, said["classes"])),
            replay=tuple(Item(**one) for one in said["replay"]),
        )

    def pair_of(self, task: int) -> int | None:
        """The fast pair that is this task's own; None once it went into slow."""
        return self.held.index(task) if task in self.held else None

    @property
    def measures(self) -> Mapping[str, Measures]:
        """By "untold" and "told"; empty before the first task."""
        return {"untold": measures(self.untold), "told": measures(self.told)} if self.tasks else {}

    def write(self, output: Path) -> None:
        """Replace `nested.json`."""
        said = asdict(self) | {"measures": {name: asdict(one) for name, one in self.measures.items()}}
        with written_whole(output / STATE) as file:
            file.write(json.dumps(said, indent=2).encode() + b"\n")


def read_state(output: Path) -> NestedState:
    """What `nested.json` of an output directory says. Raises `TrainingError`."""
    path = output / STATE
    try:
        return NestedState.of(json.loads(path.read_bytes()))
    except OSError as error:
        raise TrainingError(f"expected {STATE} in {output}, got none: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{STATE} is damaged: {error}", hint="train again, which goes on and writes it") from error


def _report(said: Mapping[str, Any]) -> TaskReport:
    settled = said["consolidation"]
    nested = {
        "consolidation": None if settled is None else Settled(**settled),
        "losses_nats": tuple(said["losses_nats"]),
    }
    return TaskReport(**{**said, **nested})


__all__ = ["STATE", "WEIGHTS", "NestedState", "Settled", "TaskReport", "read_state"]
