"""The ways to learn task after task that are compared, each an experiment of `evolution.nested_trainer`.

The images' settings were chosen on validation items of an order that is not reported; the text's are a first guess. All
arms have the same base, data, steps and learning rate, those with replay keep as many items. A LoRA has rank 8, that of
all tasks in sequence 16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np

from arrowmoe.routing.closed_form import ClosedForm
from arrowmoe.routing.statistics import summarise
from benchmarks.continual_streams import Kind, Stream
from evolution.nested_experiment import ConsolidationSpec, NestedExperiment, ReplaySpec
from evolution.nested_model import NestedModel, opened
from evolution.nested_state import NestedState
from evolution.nested_trainer import NestedTrainer
from evolution.training_job import FineTuning
from registry.digest import digest_of

SEQUENTIAL: Final = "one LoRA in sequence"
REPLAYED: Final = "one LoRA with replay"
SEPARATE: Final = "a LoRA for each, oracle"
ROUTED: Final = "a LoRA for each, router"
EMA: Final = "EMA slow/fast with replay"
OURS: Final = "ours"

TUNING: Final[Mapping[Kind, FineTuning]] = {
    "image": FineTuning(steps=120, batch_size=16, learning_rate=2e-3),
    "text": FineTuning(steps=45, batch_size=16, learning_rate=2e-3, layers=(1, 11)),
}
REPLAY: Final[Mapping[Kind, ReplaySpec]] = {
    "image": ReplaySpec(items=300, choose="random", share=2.0, distil_weight=1.0),
    "text": ReplaySpec(items=240, choose="random", share=1.0),
}
SLOW_RANK: Final = 16
EMA_DECAY: Final = 0.5

Table = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """How an experiment differs from the others."""

    trains: Literal["both", "slow", "fast"]
    rank: int = 8
    consolidation: ConsolidationSpec | None = None
    replays: bool = False
    softmax_over: Literal["seen", "own"] = "seen"


ARMS: Final[Mapping[str, Arm]] = {
    SEQUENTIAL: Arm(trains="slow", rank=16),
    REPLAYED: Arm(trains="slow", rank=16, replays=True),
    SEPARATE: Arm(trains="fast", softmax_over="own"),
    EMA: Arm(
        trains="fast",
        consolidation=ConsolidationSpec(slow=EMA_DECAY, fast=1 - EMA_DECAY, rank=SLOW_RANK, tolerance=None),
        replays=True,
    ),
    OURS: Arm(trains="both", consolidation=ConsolidationSpec(rank=SLOW_RANK, tolerance=None), replays=True),
}


def learnt(stream: Stream, seed: int, directory: Path, *, steps: int | None = None) -> Table:
    """Every arm's measures on the stream, in points; `steps` overrides those of each task."""
    table: Table = {}
    for number, (name, arm) in enumerate(ARMS.items()):
        one = experiment(stream, arm, seed, directory / f"arm-{number}", steps)
        model, tokenizer = stream.base()
        state = NestedTrainer(one, model, tokenizer).run()
        table[name] = _figures(state, "told" if name == SEPARATE else "untold", model.config.hidden_size)
        if name == SEPARATE:
            with opened(one, model, tokenizer) as separate:
                table[ROUTED] = {"average_accuracy": 100 * routed(stream, separate)}
    return table


def experiment(stream: Stream, arm: Arm, seed: int, output: Path, steps: int | None) -> NestedExperiment:
    """The stream, learnt as the arm says."""
    tuning = TUNING[stream.kind]
    return NestedExperiment(
        base=stream.spec,
        kind=stream.kind,
        tasks=tuple(task.spec for task in stream.tasks),
        tuning=replace(
            tuning,
            rank=arm.rank,
            alpha=2 * arm.rank,
            steps=steps or tuning.steps,
            # The trainer adds the task's number.
            seed=100 * seed,
        ),
        output_url=output.resolve().as_uri(),
        trains=arm.trains,
        softmax_over=arm.softmax_over,
        consolidation=arm.consolidation,
        replay=REPLAY[stream.kind] if arm.replays else None,
    )


def routed(stream: Stream, separate: NestedModel) -> float:
    """Mean accuracy over tasks where the router says which LoRA answers a row, from what the bare base makes of it."""
    shares = []
    for task, (own, chosen) in enumerate(zip(stream.tasks, _chosen(stream), strict=True)):
        rows = separate.subject.read(own.spec.test_url)
        right = 0.0
        for other in np.unique(chosen).tolist():
            # An image's class is none of another task's.
            if other == task or stream.kind == "text":
                given = [row for row, one in zip(rows, chosen, strict=True) if one == other]
                right += len(given) * separate.right(given, other)[1]
        shares.append(right / len(rows))
    return float(np.mean(shares))


def summary(tables: Sequence[Table]) -> Table:
    """The mean over seeds."""
    return {
        name: {key: float(np.mean([table[name][key] for table in tables])) for key in tables[0][name]}
        for name in tables[0]
    }


def _chosen(stream: Stream) -> list[Sequence[int]]:
    """For each task the task that the router gives each of its rows to."""
    router = ClosedForm(stream.tasks[0].train.shape[1])
    probe = digest_of(b"none")
    for number, task in enumerate(stream.tasks):
        router.add(str(number), summarise(task.train, embedder="base", probe=probe))
    return [
        [int(row.keys[row.values.argmax()]) for row in router.score(task.scored.astype(np.float64))]
        for task in stream.tasks
    ]


def _figures(state: NestedState, asked: Literal["told", "untold"], width: int) -> dict[str, float]:
    found, told = state.measures[asked], state.measures["told"]
    adapters = _adapters(state, width)
    return {
        "average_accuracy": 100 * found.average_accuracy,
        "forgetting": 100 * found.forgetting,
        "backward_transfer": 100 * found.backward_transfer,
        "told": 100 * told.average_accuracy,
        "told_forgetting": 100 * told.forgetting,
        "adapters": float(adapters[-1]),
        # After the first task slow may have less than the rank that it may keep.
        "adapters_growth": adapters[-1] / adapters[1],
        "kept_items": float(len(state.replay)),
        "seconds": sum(task.seconds for task in state.tasks),
    }


def _adapters(state: NestedState, width: int) -> list[int]:
    """Parameters of all pairs after each task: without the head, of which each class has a row and a bias."""
    classes = np.cumsum([len(part) for part in state.classes] or [0] * len(state.tasks))
    return [task.parameters - int(seen) * (width + 1) for task, seen in zip(state.tasks, classes, strict=True)]


__all__ = ["ARMS", "Arm", "Table", "experiment", "learnt", "routed", "summary"]
