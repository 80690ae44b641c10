"""A night on tiny models: a family of prompts whose answer hangs on their first word, which a tiny model can learn."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arrowmoe.base_model import load_base_model
from arrowmoe.engine import ArrowEngine
from arrowmoe.evolving import Evolution
from arrowmoe.features import TextFeaturizer
from arrowmoe.routing.router import LoRARouter
from arrowmoe.training import train_from_file
from evolution.executors import InProcess
from evolution.gate import Bars
from evolution.protocols import Example
from evolution.signals import Signal, SignalStore
from evolution.skill_distiller import Recipe
from evolution.teachers import DatasetTeacher
from evolution.training_job import FineTuning
from registry.store import Registry

BASE = "tiny"
RECIPE = Recipe(
    asks_prompts=True,
    writes=False,
    most_examples=120,
    max_new_tokens=1,
    replay_share=0,
    tuning=FineTuning(rank=4, steps=40, learning_rate=1e-2),
    bars=Bars(alpha=0.05, most_rise_nats=9, most_applied_rise_nats=99, most_kl_nats=99),
)


def gold(count: int = 120) -> list[Example]:
    """Prompts "w5 w6 …" are answered "w7", prompts "w9 w6 …" "w8"."""
    words = itertools.product((5, 9), range(10, 25), range(10, 25))
    prompts = [f"w{first} w6 w{a} w{b}" for first, a, b in words]
    random.Random(0).shuffle(prompts)
    return [Example(prompt=prompt, answer="w7" if prompt.startswith("w5") else "w8") for prompt in prompts[:count]]


def engine_of(registry: Registry, models: tuple[Path, Path], cache: Path) -> ArrowEngine:
    """A tiny engine that routes in the space of a tiny encoder."""
    engine = ArrowEngine(load_base_model(str(models[0])), registry=registry)
    featurizer = TextFeaturizer(ArrowEngine(load_base_model(str(models[1]))))
    engine.router = LoRARouter(featurizer, cache=cache)
    return engine


def evolution_of(engine: ArrowEngine, model: Path, **parts: Any) -> Evolution:
    """Its night, with a teacher that knows `gold`; trains in this process."""
    given: dict[str, Any] = {
        "teacher": DatasetTeacher(gold()),
        "recipe": RECIPE,
        "executor": InProcess(train_from_file),
    }
    return engine.enable_evolution(model=str(model), **given | parts)


def ask_in_vain(signals: SignalStore, examples: Sequence[Example]) -> list[str | None]:
    """Requests that no card was found for."""
    return signals.record_all(
        [
            Signal(base=BASE, prompt=one.prompt, accepted=False, answer="w3", sequence_nats=9.0, tokens=2)
            for one in examples
        ]
    )
