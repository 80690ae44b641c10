"""The night of one home, put together: signals, surveyor, teacher, trainer, gate, and the clock that begins it.

    evolution = engine.enable_evolution(teacher=...)      # or a node with a teacher in its settings
    evolution.run()                                       # now; or wait for the schedule

What the night asks of the rest of arrowmoe it is given here; nothing in `evolution/` knows an engine or a peer.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Self

from arrowmoe.base_model import same_base
from arrowmoe.engine import ArrowEngine
from arrowmoe.errors import RoutingError
from arrowmoe.inference import Inference
from arrowmoe.routing.router import LoRARouter
from arrowmoe.routing.statistics import CardStatistics
from arrowmoe.settings import EvolutionSettings, Settings, TeacherSettings
from arrowmoe.signalling import SignalRecorder, signal_store
from arrowmoe.students import EngineStudents, NightRoutes
from evolution.budget import Budget, Price
from evolution.cloud_distiller import CloudDistiller
from evolution.errors import TeacherError
from evolution.executors import Executor, LocalProcess
from evolution.gaps import Clustering
from evolution.gate import Bars
from evolution.journal import SCHEDULE, Journal, Now, utc_now
from evolution.protocols import Example, Routes, Students, Teacher, Theme
from evolution.schedule import POLL_S, NightSchedule, NightWatch
from evolution.skill_distiller import MLP, Recipe, SkillDistiller
from evolution.skill_factory import Nightly, NightReport, SkillFactory
from evolution.survey import Fetch, Surveying, Surveyor
from evolution.teacher_line import Endpoint
from evolution.teachers import Agreeing
from evolution.training_job import FineTuning, ModelSpec
from evolution.withdrawal import Withdrawer
from registry.database import Database
from registry.errors import RegistryError
from registry.logs import get_logger
from registry.store import Registry

SINCE = "evolution-since"
"""Note: since when this home has watched the clock."""
TRAIN = (sys.executable, "-m", "arrowmoe", "evolve", "train")
log = get_logger(__name__)


class Evolution:
    """What grows experts in one home; between `start` and `close` it begins nights by itself."""

    def __init__(
        self,
        registry: Registry,
        *,
        students: Students,
        routes: Routes,
        teacher: Teacher,
        models: Callable[[str], ModelSpec],
        settings: EvolutionSettings | None = None,
        recipe: Recipe | None = None,
        surveying: Surveying | None = None,
        executor: Executor | None = None,
        fetch: Fetch | None = None,
        now: Now = utc_now,
        poll_s: float = POLL_S,
    ) -> None:
        settings = settings or EvolutionSettings()
        self.signals = signal_store(registry.database, settings, now)
        self.journal = Journal(registry.database, now=now)
        self._expression = settings.schedule
        self._teacher, self._now, self._running = teacher, now, threading.Lock()
        self._stopping, self._poll_s = threading.Event(), poll_s
        self._watch: NightWatch | None = None
        memory_bytes = None if settings.memory_gib is None else int(settings.memory_gib * 2**30)
        self.surveyor = Surveyor(
            registry.database,
            self.signals,
            self.journal,
            routes,
            fetch=fetch,
            surveying=surveying or _surveying(settings),
        )
        distiller = SkillDistiller(
            registry,
            self.journal,
            self.signals,
            teacher=teacher,
            students=students,
            routes=routes,
            executor=executor or LocalProcess(TRAIN, memory_bytes=memory_bytes),
            models=models,
            recipe=recipe or recipe_of(settings),
        )
        self.factory = SkillFactory(
            self.journal,
            self.signals,
            students,
            self.surveyor,
            distiller,
            withdrawer=Withdrawer(registry, self.journal, self.signals),
            nightly=Nightly(most_experts=settings.most_experts, window_s=settings.window_hours * 3600),
            begin_budget=teacher.begin if isinstance(teacher, NightlyTeacher) else lambda account: None,
        )

    def run(self, planned_at: datetime | None = None) -> NightReport | None:
        """Run a night: the one planned for `planned_at`, else one for now. None if it was begun before."""
        with self._running:
            return self.factory.night(planned_at or self._now(), cancelled=self._stopping.is_set)

    def resume(self) -> list[NightReport]:
        """Carry on what a killed process left."""
        with self._running:
            return self.factory.resume(cancelled=self._stopping.is_set)

    def start(self) -> None:
        """Carry on what was left, and begin nights by the schedule that was noted or set."""
        if self.journal.note(SINCE) is None:
            self.journal.keep_note(SINCE, {"at": self._now().isoformat()})
        self._watch = NightWatch(
            self._schedule, last=self._last, begin=self.run, first=self.resume, now=self._now, poll_s=self._poll_s
        )
        self._watch.start()

    def close(self) -> None:
        """End; a night under way is given back, to be carried on at the next start."""
        self._stopping.set()
        if self._watch is not None:
            self._watch.close()
        if isinstance(self._teacher, NightlyTeacher):
            self._teacher.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _last(self, now: datetime) -> datetime | None:
        """The last night, or since when the clock is watched: what was due before is nobody's."""
        since = self.journal.note(SINCE)
        moments = [self.journal.last_night(now), None if since is None else datetime.fromisoformat(since["at"])]
        return max((moment for moment in moments if moment is not None and moment <= now), default=None)

    def _schedule(self) -> NightSchedule | None:
        """The schedule as it is now: what a command has set comes before the settings."""
        noted = self.journal.note(SCHEDULE)
        expression = self._expression if noted is None else str(noted["expression"])
        return NightSchedule(expression) if expression else None


class NightlyTeacher:
    """A `Teacher` at the settings' endpoint, with a budget for each night, asked several times where that is wanted."""

    def __init__(self, database: Database, teacher: TeacherSettings, evolution: EvolutionSettings, now: Now) -> None:
        self._database, self._settings, self._evolution, self._now = database, teacher, evolution, now
        self._distiller: CloudDistiller | None = None
        self._asked: Teacher | None = None

    @property
    def name(self) -> str:
        """The model's name."""
        return self._settings.model

    def begin(self, account: str) -> None:
        """Spend from `account` from now on."""
        self.close()
        chosen = self._settings
        budget = Budget(
            self._database,
            account,
            limit_microusd=round(self._evolution.budget_usd * 1e6),
            limit_tokens=self._evolution.budget_tokens,
            now=self._now,
        )
        self._distiller = CloudDistiller(_endpoint(chosen), budget, policy=chosen.disclosure, now=self._now)
        self._asked = Agreeing(self._distiller, votes=chosen.votes) if chosen.votes > 1 else self._distiller

    def close(self) -> None:
        """Let go of the line."""
        if self._distiller is not None:
            self._distiller.close()
        self._distiller = self._asked = None

    def answer(self, prompts: Sequence[str], *, theme: Theme) -> list[str | None]:
        """An answer to each prompt; None where the votes do not agree."""
        return self._now_asked().answer(prompts, theme=theme)

    def write(self, theme: Theme, count: int, *, avoid: Sequence[str] = ()) -> list[Example]:
        """About `count` new examples of `theme`."""
        return self._now_asked().write(theme, count, avoid=avoid)

    def _now_asked(self) -> Teacher:
        if self._asked is None:
            self.begin(f"day-{self._now():%Y-%m-%d}")
        assert self._asked is not None
        return self._asked


class NobodyTeaches:
    """The teacher of a node that names none: gaps are found, and stay open."""

    name = "nobody"

    def answer(self, prompts: Sequence[str], *, theme: Theme) -> list[str | None]:
        """Nothing. Raises `TeacherError`."""
        raise _no_teacher()

    def write(self, theme: Theme, count: int, *, avoid: Sequence[str] = ()) -> list[Example]:
        """Nothing. Raises `TeacherError`."""
        raise _no_teacher()


def evolution_of_node(
    registry: Registry, settings: Settings, inference: Inference, *, fetch: Fetch | None
) -> Evolution:
    """The night of a node, or of a command that loads models itself, with the settings' teacher."""
    chosen = settings.evolution
    teacher: Teacher = NobodyTeaches()
    if settings.teacher.model:
        teacher = NightlyTeacher(registry.database, settings.teacher, chosen, utc_now)

    def models(base: str) -> ModelSpec:
        model = inference.model_of(base)
        return ModelSpec(model=model, name=base, dtype=settings.dtype, device=settings.device)

    recipe = recipe_of(chosen)
    return Evolution(
        registry,
        students=EngineStudents(inference.engine),
        routes=NightRoutes(
            inference.featurizer, inference.index_into, policy=inference.policy(), cache=settings.cache_dir
        ),
        teacher=teacher,
        models=models,
        settings=chosen,
        recipe=replace(recipe, asks_prompts=settings.teacher.disclosure in ("redacted", "full")),
        fetch=fetch,
    )


def evolution_of_engine(
    engine: ArrowEngine,
    *,
    model: str,
    teacher: Teacher,
    settings: EvolutionSettings | None = None,
    recipe: Recipe | None = None,
    surveying: Surveying | None = None,
    executor: Executor | None = None,
) -> Evolution:
    """See `ArrowEngine.enable_evolution`."""
    registry, router = engine.registry, engine.router
    if registry is None:
        raise RegistryError("an engine without a registry has nowhere to publish", hint="give it registry=")
    if not isinstance(router, LoRARouter):
        raise RoutingError(
            "expected an engine with a LoRARouter, whose abstentions are what the night learns from",
            hint="engine.router = arrowmoe.LoRARouter(arrowmoe.TextFeaturizer(encoder))",
        )
    spec = ModelSpec(
        model=model,
        name=engine.name,
        dtype=str(engine.base.dtype).removeprefix("torch."),
        device=str(engine.base.device),
    )

    def register(own: LoRARouter) -> None:
        for entry in registry.newest():
            if entry.base_name is not None and same_base(entry.base_name, engine.name):
                own.register_card(entry, CardStatistics.of_card(registry.get(entry.digest)))

    evolution = Evolution(
        registry,
        students=EngineStudents(lambda base: engine),
        routes=NightRoutes(router.featurizer, register, policy=router.policy, cache=router.cache),
        teacher=teacher,
        models=lambda base: spec,
        settings=settings,
        recipe=recipe,
        surveying=surveying,
        executor=executor,
    )
    engine.observer = SignalRecorder(evolution.signals)
    return evolution


def recipe_of(settings: EvolutionSettings) -> Recipe:
    """How the settings want experts grown."""
    return Recipe(
        tuning=FineTuning(rank=settings.rank, alpha=2 * settings.rank, steps=settings.steps, targets=MLP),
        most_examples=settings.most_examples,
        bars=Bars(alpha=settings.alpha),
    )


def _surveying(settings: EvolutionSettings) -> Surveying:
    return Surveying(samples=settings.tier1_samples, clustering=Clustering(least_prompts=settings.least_prompts))


def _endpoint(settings: TeacherSettings) -> Endpoint:
    """Where the settings' teacher is. Raises `TeacherError` where its key is missing."""
    key = os.environ.get(settings.key_variable, "")
    if not key:
        raise TeacherError(
            f"expected the teacher's key in the variable {settings.key_variable}, which is not set",
            hint="set it, or name another with teacher.key_variable; a local server takes any word",
        )
    return Endpoint(
        model=settings.model,
        api_key=key,
        price=Price(prompt_usd_per_million=settings.prompt_usd, completion_usd_per_million=settings.completion_usd),
        timeout_s=settings.timeout_s,
        concurrency=settings.concurrency,
        base_url=settings.base_url,
    )


def _no_teacher() -> TeacherError:
    return TeacherError(
        "nobody teaches this node, so gaps are found and stay open",
        hint="name a teacher: teacher.model and teacher.base_url in the settings, its key in the environment",
    )


__all__ = [
    "Evolution",
    "NightlyTeacher",
    "NobodyTeaches",
    "evolution_of_engine",
    "evolution_of_node",
    "recipe_of",
]
