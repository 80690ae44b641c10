"""Nights on fakes: what they publish and what not."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest

from evolution.fakes import ScriptedTeacher
from evolution.protocols import Example
from evolution.skill_distiller import Recipe
from evolution.survey import OPEN, PUBLISHED, REJECTED, WAITING
from tests.evolution.nights import (
    BASE,
    TOMORROW,
    TWO_O_CLOCK,
    Make,
    gold,
    prompts,
    rule,
)


def test_a_gap_becomes_an_expert_with_evidence(make: Make) -> None:
    home = make()
    home.traffic()
    report = home.factory.night(TWO_O_CLOCK)
    assert report is not None
    assert report.to_json()["published"] == home.published() == ["question-velmora@1"]
    card = home.registry.get("question-velmora")
    assert card.signature is not None
    evaluation = card.manifest.evaluation["gate"]
    assert evaluation["accepted"]
    assert evaluation["accuracy"] == {"base": 0.0, "candidate": 1.0}
    assert card.manifest.training["teacher"] == "scripted"
    [gap] = home.journal.gaps()
    assert (gap.state, gap.card) == (PUBLISHED, card.digest)
    [night] = home.journal.nights()
    assert (night.state, night.report["published"]) == ("done", ["question-velmora@1"])
    job = report.jobs[0]
    assert [(step.phase, step.step) for step in home.journal.steps(job.id)] == [("train-1", n) for n in (1, 2, 3)]


def test_the_same_night_is_not_run_again(make: Make) -> None:
    home = make()
    home.traffic()
    assert home.factory.night(TWO_O_CLOCK) is not None
    assert home.factory.night(TWO_O_CLOCK) is None
    assert make().factory.resume() == []
    assert len(home.training.runs) == 1


def test_a_night_without_a_gap_publishes_nothing(make: Make) -> None:
    home = make()
    home.traffic(gap=0)
    report = home.factory.night(TWO_O_CLOCK)
    assert report is not None
    assert [job.kind for job in report.jobs] == ["survey"]
    assert home.published() == []
    assert home.journal.gaps() == []
    assert home.training.runs == []


def test_a_night_without_any_signal_ends_at_once(make: Make) -> None:
    home = make()
    assert home.factory.night(TWO_O_CLOCK) is not None
    assert home.journal.nights()[0].state == "done"
    assert home.students.opened == []


def test_a_preview_enters_asks_and_trains_nothing(make: Make) -> None:
    teacher = ScriptedTeacher(knows=rule)
    home = make(teacher=teacher, recipe=Recipe(asks_prompts=True))
    home.traffic()
    [found] = home.factory.preview()[BASE]
    assert (found.state, found.theme.name, found.gap.size) == (OPEN, "question-velmora", 30)
    assert (home.journal.jobs(), home.journal.gaps(), home.journal.nights(), teacher.asked) == ([], [], [], [])


@pytest.mark.parametrize(
    ("knows", "why"),
    [
        (lambda prompt: f"no {hash(prompt)}", "lift"),
        (lambda prompt: "yes always", "with 'yes always', which is no skill"),
        (lambda prompt: None, "expected at least 40 examples from scripted, got 0"),
    ],
    ids=["without rule", "always the same", "silent"],
)
def test_a_poisoned_teacher_grows_nothing(make: Make, knows: Callable[[str], str | None], why: str) -> None:
    home = make(teacher=ScriptedTeacher(knows=knows), recipe=Recipe(asks_prompts=True))
    home.traffic(gap=80)
    report = home.factory.night(TWO_O_CLOCK)
    assert report is not None
    assert home.published() == []
    [gap] = home.journal.gaps()
    assert gap.state == REJECTED
    assert why in gap.why
    assert home.signals.counts()[BASE].queued == 140, "its prompts are queued again"


def test_a_teacher_of_another_mind_in_the_exam_grows_nothing(make: Make) -> None:
    """Right while it taught what is trained on, wrong in what is held out: no lift is shown."""
    wrong = [Example(prompt=one.prompt, answer=f"no {number}") for number, one in enumerate(gold(200))]
    home = make(teacher=ScriptedTeacher(knows=rule, writes=wrong))
    home.traffic()
    assert home.factory.night(TWO_O_CLOCK) is not None
    assert home.published() == []


def test_a_rejected_gap_waits_until_it_has_grown(make: Make) -> None:
    home = make(teacher=ScriptedTeacher(knows=lambda prompt: None))
    home.traffic()
    home.factory.night(TWO_O_CLOCK)
    home.factory.night(TOMORROW)
    assert [gap.state for gap in home.journal.gaps()] == [WAITING, REJECTED]
    home.traffic(gap=60, ordinary=0)
    home.factory.night(TOMORROW + timedelta(days=1))
    assert home.journal.gaps()[0].state == REJECTED, "it was tried again"


def test_what_an_expert_covers_is_no_gap_any_more(make: Make) -> None:
    home = make()
    home.traffic()
    home.factory.night(TWO_O_CLOCK)
    home.traffic()
    home.factory.night(TOMORROW)
    assert [gap.state for gap in home.journal.gaps()] == ["covered", PUBLISHED]
    assert home.published() == ["question-velmora@1"]


def test_what_is_sealed_is_never_asked(make: Make) -> None:
    teacher = ScriptedTeacher(knows=rule, writes=gold(200))
    sealed = tuple(Example(prompt=one.upper(), answer="") for one in prompts(10))
    home = make(teacher=teacher, recipe=Recipe(asks_prompts=True, sealed=sealed))
    home.traffic(gap=40)
    home.factory.night(TWO_O_CLOCK)
    assert sorted(teacher.asked) == sorted(prompts(30, first=10))
    for file in (home.registry.home / "nights").rglob("*.jsonl"):
        assert not [one for one in prompts(10) if f'"{one}"' in file.read_text()]
