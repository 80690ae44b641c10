"""Nights that budgets, windows and limits end, and those in which something fails."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from evolution.budget import Budget
from evolution.errors import BudgetSpentError, TeacherError, TrainingError
from evolution.fakes import ScriptedTeacher
from evolution.journal import FAILED, MAX_ATTEMPTS
from evolution.protocols import Example, Theme
from evolution.skill_distiller import Recipe
from evolution.skill_factory import Nightly
from evolution.survey import FAILED as GAP_FAILED
from evolution.survey import LAPSED, PUBLISHED
from registry.database import Database
from tests.evolution.nights import (
    BASE,
    TOMORROW,
    TWO_O_CLOCK,
    Clock,
    Make,
    rule,
)

ASKING: dict[str, Any] = {
    "teacher": ScriptedTeacher(knows=rule),
    "recipe": Recipe(asks_prompts=True),
}


@dataclass
class SpendingTeacher:
    """Takes a dollar of a budget of each night for every prompt that it answers."""

    database: Database
    dollars: int
    clock: Clock
    name: str = "spending"
    budget: Budget | None = None
    asked: list[str] = field(default_factory=list)

    def begin(self, account: str) -> None:
        self.budget = Budget(
            self.database, account, limit_microusd=self.dollars * 10**6, limit_tokens=10**9, now=self.clock.now
        )

    def answer(self, prompts: list[str], *, theme: Theme) -> list[str | None]:
        assert self.budget is not None
        said: list[str | None] = []
        for prompt in prompts:
            try:
                self.budget.settle(self.budget.reserve(10**6, 1), 10**6, 1)
            except BudgetSpentError:
                if said:
                    break
                raise
            self.asked.append(prompt)
            said.append(rule(prompt))
        return said + [None] * (len(prompts) - len(said))

    def write(self, theme: Theme, count: int, *, avoid: Any = ()) -> list[Example]:
        assert self.budget is not None
        self.budget.settle(self.budget.reserve(10**6, 1), 10**6, 1)
        return []


def test_a_spent_budget_ends_the_night_and_tomorrow_goes_on(make: Make) -> None:
    clock, home = Clock(), make()
    teacher = SpendingTeacher(home.registry.database, 35, clock)
    home = make(
        teacher=teacher, recipe=Recipe(asks_prompts=True, most_examples=70), begin_budget=teacher.begin, clock=clock
    )
    home.traffic(gap=80)
    report = home.factory.night(TWO_O_CLOCK)
    assert report is not None
    assert report.error == "the budget was spent"
    assert home.published() == []
    assert home.journal.nights()[0].state == "cut short"
    assert home.factory.resume() == [], "not before it has another budget"
    clock.pass_(days=1)
    report = home.factory.night(TOMORROW)
    assert report is not None
    assert report.to_json()["published"] == home.published() == ["question-velmora@1"]
    assert len(teacher.asked) == len(set(teacher.asked)) == 70, "nothing was asked twice"
    assert len(home.journal.gaps()) == 1


def test_what_the_window_leaves_is_done_in_the_next_night(make: Make) -> None:
    clock = Clock()

    def slow(step: int) -> None:
        clock.seconds += 100

    home = make(clock=clock, before=slow, nightly=Nightly(window_s=250), **ASKING)
    home.traffic(topic="velmora", gap=60)
    home.traffic(topic="quandor", gap=60, ordinary=0)
    report = home.factory.night(TWO_O_CLOCK)
    assert report is not None
    assert report.error == "the night's window is over"
    assert len(home.published()) == 1
    assert home.journal.nights()[0].state == "cut short"
    home.factory.night(TOMORROW)
    assert sorted(home.published()) == ["quandor-question@1", "question-velmora@1"]
    assert [gap.state for gap in home.journal.gaps()] == [PUBLISHED, PUBLISHED]


def test_no_more_experts_than_allowed_and_the_others_come_another_night(make: Make) -> None:
    home = make(nightly=Nightly(most_experts=1), **ASKING)
    home.traffic(topic="velmora", gap=70)
    home.traffic(topic="quandor", gap=60, ordinary=0)
    home.factory.night(TWO_O_CLOCK)
    assert home.published() == ["question-velmora@1"], "the one with more traffic"
    home.factory.night(TOMORROW)
    assert sorted(home.published()) == ["quandor-question@1", "question-velmora@1"]
    assert sorted(gap.state for gap in home.journal.gaps()) == [LAPSED, PUBLISHED, PUBLISHED]


def test_bases_take_turns_and_share_the_night(make: Make) -> None:
    bases = ("maker/one", "maker/two")
    home = make(bases=bases)
    home.traffic()
    with home.registry.database.writing() as session:  # half of the requests were another base's
        session.connection().exec_driver_sql("UPDATE signals SET base = 'maker/one'")
    home.traffic()
    with home.registry.database.writing() as session:
        session.connection().exec_driver_sql("UPDATE signals SET base = 'maker/two' WHERE base = 'maker/tiny'")
    home.factory.night(TWO_O_CLOCK)
    assert home.students.opened == ["maker/one"] * 2 + ["maker/two"] * 2
    assert {entry.base_name for entry in home.registry.list()} == set(bases)


@pytest.mark.parametrize(
    "error", [TrainingError("its process died"), OSError(28, "No space left"), ValueError("a bug")]
)
def test_an_error_is_tried_again_and_then_given_up(make: Make, error: Exception) -> None:
    clock = Clock()

    def fails(step: int) -> None:
        raise error

    home = make(clock=clock, before=fails)
    home.traffic()
    home.factory.night(TWO_O_CLOCK)
    assert home.journal.nights()[0].ended is None
    for _ in range(MAX_ATTEMPTS):
        assert home.factory.resume() == [], "it waits"
        clock.pass_(hours=1)
        if not home.factory.resume():
            break
    [job] = [job for job in home.journal.jobs() if job.kind == "grow"]
    assert (job.state, job.attempts) == (FAILED, MAX_ATTEMPTS)
    assert str(error) in job.outcome["error"]
    assert home.journal.nights()[0].state == "done"
    [gap] = home.journal.gaps()
    assert gap.state == GAP_FAILED
    assert str(error) in gap.why
    assert home.signals.counts()[BASE].queued == 90, "its prompts are not lost"


def test_without_a_teacher_gaps_are_found_and_their_prompts_stay(make: Make) -> None:
    def nobody(prompt: str) -> str:
        raise TeacherError("nobody teaches this node")

    home = make(teacher=ScriptedTeacher(knows=nobody), recipe=Recipe(asks_prompts=True))
    home.traffic()
    report = home.factory.night(TWO_O_CLOCK)
    assert report is not None
    assert report.to_json()["unfinished"] == ["night-1/grow/1"]
    assert home.published() == []


def test_told_to_end_it_gives_its_job_back_and_goes_on_at_the_next_start(make: Make) -> None:
    ending = list[int]()

    def cancel(step: int) -> None:
        ending.append(step)
        raise TrainingError("the training was cancelled")

    home = make(before=cancel)
    home.traffic()
    report = home.factory.night(TWO_O_CLOCK, cancelled=lambda: bool(ending))
    assert report is not None
    assert report.error == "it was told to end"
    assert home.journal.nights()[0].ended is None
    [report] = make().factory.resume()
    assert report.to_json()["published"] == ["question-velmora@1"]
    assert report.jobs[0].attempts == 1, "being told to end is no failed attempt"
