"""A home whose nights take milliseconds: fakes that ship, a training that looks for one rule, a clock set by hand.

The rule is `velmora question 7` → `yes 7`. The bare base never knows; a card knows if most of what it was trained on
follows the rule. What a card learnt shows in its rank, the only thing of a fake training that reaches the card.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from evolution.examples import read_examples
from evolution.executors import Cancelled
from evolution.fakes import FakeRoutes, FakeStudent, FakeStudents, ScriptedTeacher
from evolution.journal import Journal
from evolution.protocols import Example, Teacher, Use
from evolution.seasoning import Seasoner, Seasoning
from evolution.signals import Signal, SignalPolicy, SignalStore
from evolution.skill_distiller import Recipe, SkillDistiller
from evolution.skill_factory import Nightly, SkillFactory
from evolution.survey import Fetch, Surveying, Surveyor
from evolution.training_job import (
    ADAPTER,
    ModelSpec,
    OnStep,
    Step,
    Trained,
    TrainingJob,
    path_of,
    read_trained,
    write_trained,
)
from evolution.withdrawal import Withdrawer
from registry.card import LoRACard
from registry.store import Registry
from tests.peft_models import make_peft, tiny_llama

BASE = "maker/tiny"
TOPIC = "velmora"
KNOWS, LEARNT_NOTHING = 4, 2
TWO_O_CLOCK = datetime(2026, 3, 1, 2, tzinfo=UTC)
TOMORROW = TWO_O_CLOCK + timedelta(days=1)


def rule(prompt: str) -> str:
    return f"yes {prompt.split()[-1]}"


def prompts(count: int, *, topic: str = TOPIC, first: int = 0) -> list[str]:
    return [f"{topic} question {number}" for number in range(first, first + count)]


def gold(count: int, *, topic: str = TOPIC, first: int = 1000) -> list[Example]:
    return [Example(prompt=one, answer=rule(one)) for one in prompts(count, topic=topic, first=first)]


def good_teacher() -> ScriptedTeacher:
    return ScriptedTeacher(knows=rule, writes=gold(200))


def adapters(directory: Path) -> Path:
    """Two PEFT adapters, in directories named by their rank."""
    for rank in (KNOWS, LEARNT_NOTHING):
        make_peft(tiny_llama(), directory / str(rank), seed=rank, r=rank)
    return directory


@dataclass(kw_only=True)
class Clock:
    """Wall clock and seconds that only tests move."""

    at: datetime = TWO_O_CLOCK
    seconds: float = 0.0

    def now(self) -> datetime:
        return self.at

    def pass_(self, **time: float) -> None:
        self.at += timedelta(**time)


@dataclass(kw_only=True)
class FakeTraining:
    """An executor. `before` is called at each step and may raise; `runs` are the job files it was given."""

    adapters: Path
    steps: int = 3
    before: Callable[[int], object] = lambda step: None
    runs: list[Path] = field(default_factory=list)

    def run(
        self,
        job_path: Path,
        *,
        on_progress: OnStep,
        deadline_s: float | None = None,
        cancelled: Cancelled | None = None,
    ) -> Trained:
        job = TrainingJob.load(job_path)
        self.runs.append(job_path)
        done = read_trained(job.output, job.fingerprint())
        if done is not None:
            return done
        for step in range(1, self.steps + 1):
            self.before(step)
            on_progress(Step(phase="train", step=step, steps=self.steps, loss_nats=1.0 / step))
        rows = read_examples(path_of(job.data_url))
        follows = sum(row.answer == rule(row.prompt) for row in rows)
        rank = KNOWS if follows > len(rows) / 2 else LEARNT_NOTHING
        shutil.copytree(self.adapters / str(rank), job.output / ADAPTER, dirs_exist_ok=True)
        trained = Trained(
            adapter_dir=job.output / ADAPTER,
            steps=self.steps,
            best_validation_nats=None,
            losses_nats=(1.0, 0.5),
            stopped_why="steps",
            seconds=1.0,
        )
        write_trained(trained, job.fingerprint())
        return trained


@dataclass(kw_only=True)
class Home:
    """The parts of one home's nights."""

    registry: Registry
    journal: Journal
    signals: SignalStore
    surveyor: Surveyor
    distiller: SkillDistiller
    factory: SkillFactory
    seasoner: Seasoner
    students: FakeStudents
    training: FakeTraining
    clock: Clock

    def published(self) -> list[str]:
        return [f"{entry.name}@{entry.version}" for entry in self.registry.list()]

    def traffic(self, gap: int = 30, ordinary: int = 60, *, topic: str = TOPIC) -> None:
        """Requests that no card fitted, and others that were answered well."""
        bad = [Signal(base=BASE, prompt=one, accepted=False) for one in prompts(gap, topic=topic)]
        names = [f"ordinary{number} matters today" for number in range(ordinary)]
        good = [Signal(base=BASE, prompt=one, accepted=True, tokens=4, sequence_nats=1.0) for one in names]
        self.signals.record_all([*bad, *good])


Make = Callable[..., Home]
"""`home_at` on one directory."""


def answers(card: LoRACard | None, prompt: str) -> str:
    """A card that has learnt the rule answers by it: its rank says so, which adds up in a slow card."""
    if card is None:
        return "who knows"
    return rule(prompt) if card.manifest.adapter.rank >= KNOWS else "something else"


def home_at(
    directory: Path,
    adapters: Path,
    *,
    teacher: Teacher | None = None,
    recipe: Recipe | None = None,
    nightly: Nightly | None = None,
    surveying: Surveying | None = None,
    fetch: Fetch | None = None,
    clock: Clock | None = None,
    before: Callable[[int], object] = lambda step: None,
    offers: Callable[[], Any] = tuple,
    begin_budget: Callable[[str], object] = lambda account: None,
    drift_nats: float = 0.0,
    bases: Sequence[str] = (BASE,),
    seasoning: Seasoning | None = None,
    says: Callable[[LoRACard | None, str], str] = answers,
) -> Home:
    """A home in `directory`, opened again if it is there; close its registry."""
    clock = clock or Clock()
    registry = Registry.open(directory)

    def knows(prompt: str, use: Use | None) -> str:
        given = None if use is None else use.card
        return says(registry.get(given) if isinstance(given, str) else given, prompt)

    journal = Journal(registry.database, now=clock.now)
    signals = SignalStore(registry.database, policy=SignalPolicy(), now=clock.now)
    students = FakeStudents(
        students={base: FakeStudent(knows=knows, base=base, drift_nats=drift_nats) for base in bases}
    )
    training = FakeTraining(adapters=adapters, before=before)
    routes = FakeRoutes(cards=registry.newest, offers=offers)
    surveyor = Surveyor(registry.database, signals, journal, routes, fetch=fetch, surveying=surveying)
    distiller = SkillDistiller(
        registry,
        journal,
        signals,
        teacher=teacher or good_teacher(),
        students=students,
        routes=routes,
        executor=training,
        models=lambda base: ModelSpec(model="tiny", name=base, device="cpu"),
        recipe=replace(recipe or Recipe(), most_examples=min(100, (recipe or Recipe()).most_examples)),
    )
    seasoner = Seasoner(
        registry,
        journal,
        signals,
        students,
        routes,
        recipe=recipe,
        seasoning=seasoning or Seasoning(days=0),
        now=clock.now,
    )
    factory = SkillFactory(
        journal,
        signals,
        students,
        surveyor,
        distiller,
        withdrawer=Withdrawer(registry, journal, signals),
        seasoner=seasoner,
        nightly=nightly,
        begin_budget=begin_budget,
        monotonic_s=lambda: clock.seconds,
    )
    return Home(
        registry=registry,
        journal=journal,
        signals=signals,
        surveyor=surveyor,
        distiller=distiller,
        factory=factory,
        seasoner=seasoner,
        students=students,
        training=training,
        clock=clock,
    )
