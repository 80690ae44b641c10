"""A home that learns one skill with tiny models: python -m tests.e2e.night_home HOME MODEL, which may be killed.

As at the start of a node, a night that was left is carried on first. The skill: the last word decides the answer.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from arrowmoe.base_model import load_base_model
from arrowmoe.engine import ArrowEngine
from arrowmoe.evolving import Evolution
from arrowmoe.settings import EvolutionSettings
from evolution.executors import Executor
from evolution.gate import Bars
from evolution.protocols import Example
from evolution.signals import Signal
from evolution.skill_distiller import Recipe
from evolution.teachers import DatasetTeacher
from evolution.training_job import FineTuning
from registry.store import Registry
from tests.arrowmoe.routing.topics import router

BASE = "maker/tiny"
STEPS = 200
GOLD = [
    Example(prompt=f"north w{first} w{second} w{last}", answer=f"w{last + 30}")
    for first in range(10, 18)
    for second in range(20, 27)
    for last in (3, 4)
]
ROUTES = router().featurizer


def evolution_of(
    registry: Registry,
    model: Path,
    *,
    gold: Sequence[Example] = GOLD,
    executor: Executor | None = None,
) -> Evolution:
    engine = ArrowEngine(load_base_model(model, name=BASE, device="cpu"), registry=registry)
    engine.router = router()
    tuning = FineTuning(rank=8, steps=STEPS, learning_rate=1e-2)
    bars = Bars(alpha=0.05, most_kl_nats=1e3, most_applied_rise_nats=1e3)
    return engine.enable_evolution(
        teacher=DatasetTeacher(gold),
        model=str(model),
        settings=EvolutionSettings(),
        recipe=Recipe(tuning=tuning, targets="all", asks_prompts=True, writes=False, bars=bars, max_new_tokens=4),
        executor=executor,
    )


def traffic(gold: Sequence[Example] = GOLD) -> list[Signal]:
    return [Signal(base=BASE, prompt=example.prompt, accepted=False) for example in gold]


def main(home: Path, model: Path) -> None:
    with Registry.open(home) as registry, evolution_of(registry, model) as evolution:
        journal = evolution.journal
        if not journal.nights():
            evolution.run()
        while any(night.ended is None for night in journal.nights()):
            time.sleep(0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
