"""Nights on fakes: what they publish and what not, budgets, windows, retries; kill -9 wherever something is written."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from evolution.budget import Budget
from evolution.errors import BudgetSpentError, TeacherError, TrainingError
from evolution.fakes import ScriptedTeacher
from evolution.journal import DONE, FAILED, MAX_ATTEMPTS
from evolution.protocols import Example, Theme
from evolution.skill_distiller import Recipe
from evolution.skill_factory import Nightly
from evolution.survey import FAILED as GAP_FAILED
from evolution.survey import LAPSED, OPEN, PUBLISHED, REJECTED, WAITING
from registry.database import Database
from tests.evolution.nights import BASE, TOPIC, TWO_O_CLOCK, Clock, Home, adapters, gold, home_at, prompts, rule

Make = Callable[..., Home]
ASKING: dict[str, Any] = {
    "teacher": ScriptedTeacher(knows=rule),
    "recipe": Recipe(asks_prompts=True),
}
TOMORROW = TWO_O_CLOCK + timedelta(days=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def directory(tmp_path: Path, empty_home: Path) -> Path:
    shutil.copytree(empty_home, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def make(directory: Path, trained: Path) -> Iterator[Make]:
    homes: list[Home] = []

    def made(**parts: Any) -> Home:
        homes.append(home_at(directory, trained, **parts))
        return homes[-1]

    yield made
    for home in homes:
        home.registry.close()


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


# What a night publishes, and what not ------------------------------------------------------------------------------


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


# Budgets, windows, errors ------------------------------------------------------------------------------------------


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


# kill -9 -----------------------------------------------------------------------------------------------------------


def caller() -> str:
    """The function of `evolution` that is writing."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent.name == "evolution" and path.parent.parent.name != "tests":
            return frame.f_code.co_name
        frame = frame.f_back
    return "nobody"


@contextmanager
def failpoints(kill_at: int | None, log: Path | None) -> Iterator[None]:
    """Count what is written: each transaction, rename and training step, before and after; die -9 at one of them."""
    count = 0

    def point(what: str) -> None:
        nonlocal count
        count += 1
        if log is not None:
            with log.open("a") as file:
                file.write(f"{what}\n")
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    writing, replace, path_replace = Database.writing, os.replace, Path.replace

    @contextmanager
    def pointed_writing(self: Database) -> Iterator[Any]:
        where = caller()
        point(f"before {where}")
        with writing(self) as session:
            yield session
        point(f"after {where}")

    def pointed(real: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(source: Any, target: Any, **options: Any) -> Any:
            point(f"before {Path(target).suffix}")
            made = real(source, target, **options)
            point(f"after {Path(target).suffix}")
            return made

        return replaced

    Database.writing = pointed_writing  # type: ignore[method-assign]
    os.replace, Path.replace = pointed(replace), pointed(path_replace)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        Database.writing = writing  # type: ignore[method-assign]
        os.replace, Path.replace = replace, path_replace  # type: ignore[assignment,method-assign]


def in_a_child(work: Callable[[], None]) -> int:
    """How a process that does `work` ended: 0, or the number of the signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def run_night(directory: Path, trained: Path, *, kill_at: int | None = None, log: Path | None = None) -> None:
    """Begin the night or carry it on, as the start of a node does."""
    home = home_at(directory, trained)
    with failpoints(kill_at, log):
        home.factory.resume()
        home.factory.night(TWO_O_CLOCK)
    home.registry.close()


def test_killed_wherever_it_writes_a_night_goes_on_to_the_same_end(
    directory: Path, trained: Path, tmp_path: Path
) -> None:
    home = home_at(directory, trained)
    home.traffic()
    home.registry.close()
    log = tmp_path / "points"
    whole = shutil.copytree(directory, tmp_path / "whole")
    assert in_a_child(lambda: run_night(whole, trained, log=log)) == 0
    points = log.read_text().splitlines()
    first = {what: number for number, what in reversed([*enumerate(points, 1)])}
    last = {what: number for number, what in enumerate(points, 1)}
    assert {
        "before begin_night",
        "after enqueue",
        "after enter_gap",
        "after assign",
        "before .jsonl",
        "after .arrow",
    } <= (first.keys())
    for number in sorted({*first.values(), *last.values()}):
        killed = shutil.copytree(directory, tmp_path / f"killed-{number}")
        ended = in_a_child(lambda: run_night(killed, trained, kill_at=number))  # noqa: B023
        assert ended == signal.SIGKILL, points[number - 1]
        assert in_a_child(lambda: run_night(killed, trained)) == 0, points[number - 1]  # noqa: B023
        found = home_at(killed, trained)
        assert found.published() == ["question-velmora@1"], points[number - 1]
        [night] = found.journal.nights()
        assert (night.state, night.report["published"]) == ("done", ["question-velmora@1"]), points[number - 1]
        assert {job.state for job in found.journal.jobs()} == {DONE}, points[number - 1]
        assert [gap.state for gap in found.journal.gaps() if gap.state != LAPSED] == [PUBLISHED], points[number - 1]
        spent = found.journal.note(f"alpha:{BASE}")
        assert spent is not None
        assert spent["tests"] == 1, points[number - 1]
        held = [one for gap in found.journal.gaps(state=PUBLISHED) for one in found.signals.of_gap(gap.id)]
        assert {one.prompt for one in held} == set(prompts(30, topic=TOPIC)), points[number - 1]
        found.registry.close()
        shutil.rmtree(killed)
