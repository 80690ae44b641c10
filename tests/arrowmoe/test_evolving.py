"""The night put together, on tiny models: signals in, an expert out, and what the clock and the teacher have to do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from arrowmoe import evolution_commands
from arrowmoe.engine import ArrowEngine
from arrowmoe.errors import RoutingError
from arrowmoe.evolving import Evolution, recipe_of
from arrowmoe.night_teachers import NightlyTeacher, NobodyTeaches
from arrowmoe.settings import EvolutionSettings, Settings, TeacherSettings
from evolution import skill_distiller
from evolution.budget import standing_of
from evolution.clock import utc_now
from evolution.errors import BudgetSpentError, JobError, TeacherError
from evolution.fakes import FakeRoutes, FakeStudents
from evolution.loopback_teacher import LoopbackTeacher
from evolution.protocols import Theme
from evolution.teacher_audit import TeacherAudit
from evolution.training_job import ModelSpec, Targets
from registry.errors import RegistryError
from registry.store import Registry
from tests.arrowmoe.nights import BASE, RECIPE, ask_in_vain, engine_of, evolution_of, gold
from tests.evolution.jobs import TEXTS

THEME = Theme(name="first-words", description="Answers by the first word.")
TWO = datetime(2026, 6, 1, 2, tzinfo=UTC)


@pytest.fixture
def registry(home: Path) -> Iterator[Registry]:
    with Registry.open(home) as opened:
        yield opened


@pytest.fixture
def engine(registry: Registry, tiny_models: tuple[Path, Path], tmp_path: Path) -> ArrowEngine:
    return engine_of(registry, tiny_models, tmp_path / "cache")


def eventually(holds: Callable[[], bool], within_s: float = 20.0) -> None:
    waiting = threading.Event()
    for _ in range(int(within_s / 0.05)):
        if holds():
            return
        waiting.wait(0.05)
    raise AssertionError(f"not within {within_s:g} s")


def test_what_no_card_fits_is_learned_published_and_routed_to(
    engine: ArrowEngine, registry: Registry, tiny_models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evolution_commands, "TELL_EVERY_S", 0.02)
    seen: list[Mapping[str, Any]] = []
    with_gold = gold()
    evolution = evolution_of(engine, tiny_models[0])
    before = engine.generate([one.prompt for one in with_gold[:40]], adapter="auto", max_new_tokens=1)
    ids = [made.signal for made in before]
    assert all(ids)
    assert {signal.id for signal in evolution.signals.queued(BASE)} == set(ids)
    ask_in_vain(evolution.signals, with_gold[40:])

    told = evolution_commands.run(evolution, Settings(home=registry.home), {}, seen.append)

    assert any(one["stage"] == "train" and one["steps"] == 40 and one["loss_nats"] > 0 for one in seen)
    (night,) = told["nights"]
    assert (told["ok"], told["resumed"], len(night["published"])) == (True, False, 1)
    assert (night["gaps"][0]["state"], night["found"]) == ("published", {"open": 1})
    card = registry.get(night["gaps"][0]["card"])
    assert card.manifest.evaluation["gate"]["accepted"] is True
    after = engine.generate([one.prompt for one in with_gold], adapter="auto", max_new_tokens=1)
    assert {name for made in after for name in made.adapters} == {card.name}
    right = [made.text.strip() == one.answer for made, one in zip(after, with_gold, strict=True)]
    assert sum(right) > sum(made.text.strip() == one.answer for made, one in zip(before, with_gold, strict=False)) + 20
    assert evolution_commands.run(evolution, Settings(home=registry.home), {}, seen.append)["nights"][0]["gaps"] == []


def test_an_expert_that_has_stood_answers_from_the_slow_card_as_well(
    engine: ArrowEngine, registry: Registry, tiny_models: tuple[Path, Path]
) -> None:
    settings = EvolutionSettings(consolidate_after_days=1e-9, slow_rank=8)
    evolution = evolution_of(engine, tiny_models[0], settings=settings)
    ask_in_vain(evolution.signals, gold())
    assert evolution.run() is not None
    (night,) = evolution_commands.run(evolution, Settings(home=registry.home), {}, lambda done: None)["nights"]
    assert night["not_consolidated"] == {}
    [(expert, label)] = night["consolidated"].items()
    slow = registry.get(label, verify=True)
    assert slow.manifest.parents == (registry.get(expert).digest,)
    assert slow.manifest.adapter.rank == registry.get(expert).manifest.adapter.rank
    prompts = [one.prompt for one in gold(40)]
    engine.load_lora(slow)
    by_expert, by_slow = (engine.generate(prompts, adapter=name, max_new_tokens=1) for name in (expert, slow.name))
    assert [made.text for made in by_slow] == [made.text for made in by_expert]
    routed = engine.generate(prompts, adapter="auto", max_new_tokens=1)
    assert {name for made in routed for name in made.adapters} <= {expert, slow.name}
    evolution_commands.roll_back(registry, None)
    assert [entry.name for entry in registry.list()] == [expert]


@pytest.mark.parametrize("targets", ["mlp", "hot"])
def test_a_card_says_where_it_was_adapted(
    engine: ArrowEngine,
    registry: Registry,
    tiny_models: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    targets: Targets,
) -> None:
    monkeypatch.setattr(skill_distiller, "replay", lambda: TEXTS)  # the shipped one has no word of the tiny model's
    tuning = replace(RECIPE.tuning, steps=80, learning_rate=2e-2)
    recipe = replace(RECIPE, targets=targets, replay_share=0.25, tuning=tuning)
    evolution = evolution_of(engine, tiny_models[0], recipe=recipe)
    ask_in_vain(evolution.signals, gold())
    assert evolution.run() is not None
    [gap] = evolution.journal.gaps()
    assert gap.card is not None, gap.why
    manifest = registry.get(gap.card).manifest
    plan, adapter = manifest.training["plan"], manifest.adapter
    assert (plan["targets"], plan["rank"]) == (targets, 4)
    ranks = {module: plan["ranks"].get(module, plan["rank"]) for module in adapter.target_modules}
    assert ranks == {module: adapter.rank_of(module) for module in adapter.target_modules}
    assert plan["modules"] == len(ranks)
    mlp = 2 * 3 * (16 + 32) * 4
    assert plan["parameters"] == mlp if targets == "mlp" else plan["parameters"] <= mlp
    assert all(".mlp." in module for module in ranks) or targets == "hot"


def test_settings_say_where_experts_adapt() -> None:
    assert recipe_of(EvolutionSettings()).targets == "mlp"
    assert recipe_of(EvolutionSettings(targets="hot")).targets == "hot"


def test_a_preview_changes_nothing(engine: ArrowEngine, registry: Registry, tiny_models: tuple[Path, Path]) -> None:
    evolution = evolution_of(engine, tiny_models[0])
    ask_in_vain(evolution.signals, gold())
    told = evolution_commands.run(evolution, Settings(home=registry.home), {"dry_run": True}, lambda done: None)
    assert [(one["base"], one["grows"], one["prompts"]) for one in told["gaps"]] == [(BASE, True, 120)]
    assert (evolution.journal.nights(), evolution.journal.gaps()) == ([], [])
    assert len(evolution.signals.queued(BASE)) == 120


def test_a_second_night_is_refused_while_one_is_under_way(
    engine: ArrowEngine, registry: Registry, tiny_models: tuple[Path, Path]
) -> None:
    evolution = evolution_of(engine, tiny_models[0])
    evolution.journal.enqueue("night-1/survey/tiny", "survey", BASE, spec={})
    assert evolution.journal.claim() is not None
    with pytest.raises(JobError, match="a night is under way: night-1/survey/tiny"):
        evolution_commands.run(evolution, Settings(home=registry.home), {}, lambda done: None)


def test_an_unfinished_night_is_carried_on_before_a_new_one_begins(
    engine: ArrowEngine, registry: Registry, tiny_models: tuple[Path, Path]
) -> None:
    evolution = evolution_of(engine, tiny_models[0])
    settings = Settings(home=registry.home)
    left = evolution.journal.begin_night(utc_now() - timedelta(hours=5))
    assert left is not None
    told = evolution_commands.run(evolution, settings, {}, lambda done: None)
    assert (told["resumed"], [night["night"] for night in told["nights"]]) == (True, [f"night-{left}"])
    fresh = evolution_commands.run(evolution, settings, {"fresh": True}, lambda done: None)
    assert (fresh["resumed"], [night["night"] for night in fresh["nights"]]) == (False, [f"night-{left + 1}"])


def test_a_night_begins_by_the_schedule_that_a_command_has_set(registry: Registry) -> None:
    clock = [TWO - timedelta(minutes=1)]
    evolution = Evolution(
        registry,
        students=FakeStudents(students={}),
        routes=FakeRoutes(cards=registry.list),
        teacher=NobodyTeaches(),
        models=lambda base: ModelSpec(model=base, name=base),
        settings=EvolutionSettings(schedule="0 5 * * *"),
        now=lambda: clock[0],
        poll_s=0.02,
    )
    zone = datetime.now().astimezone().tzinfo
    at = TWO.astimezone(zone)
    evolution_commands.set_schedule(registry, Settings(home=registry.home), f"{at.minute} {at.hour} * * *")
    with evolution:
        clock[0] = TWO - timedelta(seconds=1)
        threading.Event().wait(0.2)
        assert evolution.journal.nights() == []
        clock[0] = TWO + timedelta(hours=1)
        eventually(lambda: [night.planned_at for night in evolution.journal.nights()] == [TWO])
        evolution_commands.set_schedule(registry, Settings(home=registry.home), "")
        clock[0] = TWO + timedelta(days=1, hours=1)
        threading.Event().wait(0.2)
    assert len(evolution.journal.nights()) == 1


def test_an_engine_without_registry_or_router_cannot_evolve(
    registry: Registry, tiny_models: tuple[Path, Path], tmp_path: Path
) -> None:
    engine = engine_of(registry, tiny_models, tmp_path)
    engine.router = None
    with pytest.raises(RoutingError, match="LoRARouter"):
        evolution_of(engine, tiny_models[0])
    engine.registry = None
    with pytest.raises(RegistryError, match="nowhere to publish"):
        evolution_of(engine, tiny_models[0])


class TestTheSettingsTeacher:
    def teacher(self, registry: Registry, url: str, budget_tokens: int = 2_000_000) -> NightlyTeacher:
        settings = TeacherSettings(model="loopback", base_url=url, votes=1, disclosure="full", prompt_usd=1.0)
        return NightlyTeacher(registry.database, settings, EvolutionSettings(budget_tokens=budget_tokens), utc_now)

    def test_each_night_has_a_budget_and_an_audit_of_its_own(
        self, registry: Registry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", "any")
        prompts = [one.prompt for one in gold(4)]
        with LoopbackTeacher(gold()) as server:
            teacher = self.teacher(registry, server.url)
            for account in ("night-1", "night-2"):
                teacher.begin(account)
                assert teacher.answer(prompts, theme=THEME) == [one.answer for one in gold(4)]
            teacher.close()
        for account in ("night-1", "night-2"):
            calls = TeacherAudit(registry.database, account, now=utc_now).calls()
            standing = standing_of(registry.database, account)
            assert standing is not None
            assert (standing.spent.microusd, standing.reserved.tokens) == (sum(call.microusd for call in calls), 0)
            assert standing.spent.microusd > 0

    def test_a_spent_budget_stops_it(self, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", "any")
        with LoopbackTeacher(gold()) as server:
            teacher = self.teacher(registry, server.url, budget_tokens=10)
            teacher.begin("night-1")
            with pytest.raises(BudgetSpentError):
                teacher.answer([gold(1)[0].prompt], theme=THEME)
            teacher.close()
            assert server.requests == []

    def test_a_missing_key_is_said_when_it_is_needed(self, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        teacher = self.teacher(registry, "http://127.0.0.1:1")
        teacher.begin("night-1")
        with pytest.raises(TeacherError, match="OPENAI_API_KEY"):
            teacher.answer(["w5"], theme=THEME)
        teacher.close()


def test_a_missing_key_does_not_keep_a_night_from_ending(
    engine: ArrowEngine,
    registry: Registry,
    tiny_models: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    nightly = NightlyTeacher(registry.database, TeacherSettings(model="m"), EvolutionSettings(), utc_now)
    evolution: Evolution = evolution_of(engine, tiny_models[0], teacher=nightly)
    ask_in_vain(evolution.signals, gold())
    (night,) = evolution_commands.run(evolution, Settings(home=registry.home), {}, lambda done: None)["nights"]
    grown = [job for job in night["jobs"] if job["kind"] == "grow"]
    assert (night["ok"], night["found"], len(grown)) == (False, {"open": 1}, 1)
    assert "OPENAI_API_KEY" in grown[0]["error"]
