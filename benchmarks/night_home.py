"""The home that the nights are run in: an engine with a router, a teacher process that is not to be trusted, the night.

Everything is the product's own: `engine.enable_evolution`, the settings' teacher, training in a child process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arrowmoe.base_model import default_cache, load_base_model
from arrowmoe.demo.shipped import CARDS
from arrowmoe.engine import ArrowEngine
from arrowmoe.evolving import Evolution
from arrowmoe.features import TextFeaturizer, Vectors
from arrowmoe.generation import Generation
from arrowmoe.night_teachers import NightlyTeacher
from arrowmoe.routing.router import LoRARouter
from arrowmoe.routing.statistics import CardStatistics
from arrowmoe.settings import EvolutionSettings, TeacherSettings
from evolution.clock import utc_now
from evolution.examples import write_examples
from evolution.protocols import Example, Teacher
from evolution.skill_distiller import Recipe
from registry.format import LoRAFormat
from registry.store import Registry

BASE, EMBEDDER = "builtin:smollm2", "builtin:minilm"
MAX_NEW_TOKENS = 16
ROWS_AT_ONCE = 32
KEY_VARIABLE = "ARROWMOE_BENCHMARK_TEACHER_KEY"
FAULTS = {"wrong": 0.1, "rate-limit": 0.05, "retry-after-s": 0.2, "stall": 0.02, "stall-s": 5.0, "error": 0.02}
TIMEOUT_S = 2.0
WRONG = FAULTS["wrong"]
VOTES = 3


@dataclass(frozen=True, kw_only=True)
class Home:
    """What a benchmark of the night asks and measures."""

    registry: Registry
    engine: ArrowEngine
    evolution: Evolution
    teacher: Teacher
    teacher_log: Path

    def served(self, prompts: Sequence[str], *, watched: bool = False) -> list[Generation]:
        """Answers as the router serves them; `watched`: as requests, of which the night learns."""
        return self._answers(prompts, "auto", watched=watched)

    def bare(self, prompts: Sequence[str]) -> list[Generation]:
        """Answers of the base model alone."""
        return self._answers(prompts, None, watched=False)

    def with_card(self, prompts: Sequence[str], name: str) -> list[Generation]:
        """Answers with one card, whatever is asked."""
        return self._answers(prompts, name, watched=False)

    def sent(self) -> str:
        """Everything that has left for the teacher."""
        return self.teacher_log.read_text(encoding="utf-8") if self.teacher_log.exists() else ""

    def encoded(self, texts: Sequence[str], adapter: str | None, *, watched: bool = False) -> Vectors:
        """Unit vectors (n, d), each by the card that the router chooses if `adapter` is "auto"."""
        with self._watched(watched):
            vectors = self.engine.encode_with_lora(texts, adapter)
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)

    def _answers(self, prompts: Sequence[str], adapter: str | None, *, watched: bool) -> list[Generation]:
        made: dict[int, Generation] = {}
        with self._watched(watched):
            for rows in np.array_split(np.argsort([len(one) for one in prompts]), -(-len(prompts) // ROWS_AT_ONCE)):
                asked: list[Any] = [[{"role": "user", "content": prompts[row]}] for row in rows]
                answers = self.engine.generate(asked, adapter, max_new_tokens=MAX_NEW_TOKENS)
                made.update(zip(rows.tolist(), answers, strict=True))
        return [made[row] for row in range(len(prompts))]

    @contextmanager
    def _watched(self, watched: bool) -> Iterator[None]:
        """Whether the night is told of what is asked."""
        observer, self.engine.observer = self.engine.observer, self.engine.observer if watched else None
        try:
            yield
        finally:
            self.engine.observer = observer


@contextmanager
def opened(
    directory: Path,
    gold: Sequence[Example],
    *,
    settings: EvolutionSettings,
    recipe: Recipe,
    base: str = BASE,
    cards: Sequence[str] = ("ticket-triage",),
) -> Iterator[Home]:
    """A home with some of the shipped cards, and a teacher that knows `gold`."""
    log = directory / "teacher.jsonl"
    with taught_by(directory / "gold.jsonl", gold, log) as url, Registry.open(directory / "home") as registry:
        engine = ArrowEngine(load_base_model(base, device="cpu"), registry=registry)
        engine.router = routed(registry, cards)
        teacher = NightlyTeacher(registry.database, teacher_at(url), settings, utc_now)
        evolution = engine.enable_evolution(teacher=teacher, model=base, settings=settings, recipe=recipe)
        try:
            yield Home(registry=registry, engine=engine, evolution=evolution, teacher=teacher, teacher_log=log)
        finally:
            evolution.close()


def routed(registry: Registry, cards: Sequence[str]) -> LoRARouter:
    """A router over MiniLM's space that knows those shipped cards, which are published here."""
    featurizer = TextFeaturizer(ArrowEngine(load_base_model(EMBEDDER, device="cpu")))
    router = LoRARouter(featurizer, cache=default_cache() / "probes")
    for name in cards:
        card = LoRAFormat.load(CARDS / f"{name}.lora.arrow")
        router.register_card(registry.publish(card), CardStatistics.of_card(card))
    return router


def teacher_at(url: str) -> TeacherSettings:
    """The teacher as settings name it; prompts go out in full, for nobody could describe facts that are invented."""
    os.environ[KEY_VARIABLE] = "any"
    return TeacherSettings(
        model="loopback",
        base_url=url,
        key_variable=KEY_VARIABLE,
        timeout_s=TIMEOUT_S,
        votes=VOTES,
        disclosure="full",
        prompt_usd=0.15,
        completion_usd=0.6,
    )


@contextmanager
def taught_by(path: Path, gold: Sequence[Example], log: Path) -> Iterator[str]:
    """The URL of a teacher in a process of its own, until the block ends."""
    write_examples(path, gold)
    faults = [f"--{name}={value}" for name, value in FAULTS.items()]
    command = [sys.executable, "-m", "evolution.loopback_teacher", str(path), "--log", str(log), *faults]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()
