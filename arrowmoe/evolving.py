"""The night of one home, put together: signals, surveyor, teacher, trainer, gate, and the clock that begins it.

    evolution = engine.enable_evolution(teacher=...)      # or a node with a teacher in its settings
    evolution.run()                                       # now; or wait for the schedule

What the night asks of the rest of arrowmoe it is given here; nothing in `evolution/` knows an engine or a peer.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Self

from arrowmoe.base_names import same_base
from arrowmoe.engine import ArrowEngine
from arrowmoe.errors import RoutingError
from arrowmoe.inference import Inference
from arrowmoe.night_teachers import NightlyTeacher, is_told_prompts, teacher_of
from arrowmoe.routing.router import LoRARouter
from arrowmoe.routing.statistics import CardStatistics
from arrowmoe.settings import EvolutionSettings, Settings
from arrowmoe.signalling import SignalRecorder, signal_store
from arrowmoe.students import EngineStudents, NightRoutes
from evolution.anchors import anchors
from evolution.clock import Now, utc_now
from evolution.executors import Executor, LocalProcess
from evolution.gaps import Clustering
from evolution.gate import Bars
from evolution.journal import SCHEDULE, Journal
from evolution.protocols import Example, Routes, Students, Teacher
from evolution.schedule import POLL_S, NightSchedule, NightWatch
from evolution.seasoning import Seasoner, Seasoning
from evolution.skill_distiller import Recipe, SkillDistiller
from evolution.skill_factory import Nightly, NightReport, SkillFactory
from evolution.survey import Fetch, Surveying, Surveyor
from evolution.training_job import FineTuning, ModelSpec
from evolution.withdrawal import Withdrawer
from registry.entries import CardEntry
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
        after: Callable[[], object] = lambda: None,
        now: Now = utc_now,
        poll_s: float = POLL_S,
    ) -> None:
        settings = settings or EvolutionSettings()
        self.signals = signal_store(registry.database, settings, now)
        self.journal = Journal(registry.database, now=now)
        self._expression = settings.schedule
        self._teacher, self._now, self._after, self._running = teacher, now, after, threading.Lock()
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
        recipe = recipe or recipe_of(settings)
        distiller = SkillDistiller(
            registry,
            self.journal,
            self.signals,
            teacher=teacher,
            students=students,
            routes=routes,
            executor=executor or LocalProcess(TRAIN, memory_bytes=memory_bytes),
            models=models,
            recipe=recipe,
        )
        seasoner = Seasoner(
            registry,
            self.journal,
            self.signals,
            students,
            routes,
            recipe=recipe,
            seasoning=Seasoning(days=settings.consolidate_after_days, rank=settings.slow_rank),
            now=now,
        )
        self.factory = SkillFactory(
            self.journal,
            self.signals,
            students,
            self.surveyor,
            distiller,
            withdrawer=Withdrawer(registry, self.journal, self.signals),
            seasoner=seasoner,
            nightly=Nightly(most_experts=settings.most_experts, window_s=settings.window_hours * 3600),
            begin_budget=teacher.begin if isinstance(teacher, NightlyTeacher) else lambda account: None,
        )

    def run(self, planned_at: datetime | None = None) -> NightReport | None:
        """Run a night: the one planned for `planned_at`, else one for now. None if it was begun before."""
        with self._working():
            return self.factory.night(planned_at or self._now(), cancelled=self._stopping.is_set)

    def resume(self) -> list[NightReport]:
        """Carry on what a killed process left."""
        with self._working():
            return self.factory.resume(cancelled=self._stopping.is_set)

    def start(self) -> None:
        """Carry on what was left, and begin nights by the schedule that was noted or set."""
        if self.journal.note(SINCE) is None:
            self.journal.keep_note(SINCE, {"at": self._now().isoformat()})
        self._watch = NightWatch(
            self._schedule, last=self._last, begin=self.run, resume=self.resume, now=self._now, poll_s=self._poll_s
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

    @contextmanager
    def _working(self) -> Iterator[None]:
        """One night at a time; at its end whoever serves takes up what was published."""
        with self._running:
            try:
                yield
            finally:
                self._after()

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


class _Following:
    """Brings to a router what its registry has got or lost since; what the router was given besides stays."""

    def __init__(self, router: LoRARouter, registry: Registry, base: str) -> None:
        self._router, self._registry, self._base = router, registry, base
        self._known = self._newest()

    def __call__(self) -> None:
        newest = self._newest()
        for digest in self._known.keys() - newest.keys():
            self._router.unregister(digest)
        for digest in newest.keys() - self._known.keys():
            self._router.register_card(newest[digest], CardStatistics.of_card(self._registry.get(digest)))
        self._known = newest

    def _newest(self) -> dict[str, CardEntry]:
        entries = self._registry.newest()
        return {one.digest: one for one in entries if one.base_name and same_base(one.base_name, self._base)}


def evolution_of_node(
    registry: Registry, settings: Settings, inference: Inference, *, fetch: Fetch | None
) -> Evolution:
    """The night of a node, or of a command that loads models itself, with the settings' teacher."""
    chosen = settings.evolution

    def models(base: str) -> ModelSpec:
        model = inference.model_of(base)
        # A frozen base loses nothing that training would miss, and its passes take half as long.
        dtype = "bfloat16" if inference.engine(base).base.kind == "causal" else settings.dtype
        return ModelSpec(model=model, name=base, dtype=dtype, device=settings.device)

    return Evolution(
        registry,
        students=EngineStudents(inference.engine),
        routes=NightRoutes(
            inference.featurizer, inference.index_into, policy=inference.policy(), cache=settings.cache_dir
        ),
        teacher=teacher_of(registry.database, settings, inference),
        models=models,
        settings=chosen,
        recipe=replace(recipe_of(chosen), asks_prompts=is_told_prompts(settings.teacher)),
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
        after=_Following(router, registry, engine.name),
    )
    engine.observer = SignalRecorder(evolution.signals)
    return evolution


def recipe_of(settings: EvolutionSettings) -> Recipe:
    """How the settings want experts grown."""
    return Recipe(
        tuning=FineTuning(rank=settings.rank, alpha=2 * settings.rank, steps=settings.steps),
        targets=settings.targets,
        most_examples=settings.most_examples,
        anchors=_first(anchors(), settings.anchors),
        bars=Bars(alpha=settings.alpha),
    )


def _first(sets: Mapping[str, tuple[Example, ...]], count: int) -> dict[str, tuple[Example, ...]]:
    """As many of all sets together, equally many of each."""
    return {name: items[: count // len(sets)] for name, items in sets.items()}


def _surveying(settings: EvolutionSettings) -> Surveying:
    return Surveying(samples=settings.tier1_samples, clustering=Clustering(least_prompts=settings.least_prompts))


__all__ = [
    "Evolution",
    "evolution_of_engine",
    "evolution_of_node",
    "recipe_of",
]
