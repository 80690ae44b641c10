"""When nights are due: cron, clocks that jump or are put back, a machine that slept, and the thread that looks."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from evolution.journal import Journal
from evolution.schedule import NightSchedule, NightWatch, ScheduleError
from registry.database import Database, sqlite_url

BERLIN = ZoneInfo("Europe/Berlin")
NIGHTLY = NightSchedule("0 2 * * *", UTC)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("0 2 * * *", "2026-03-05T02:00"),
        ("*/20 * * * *", "2026-03-04T12:20"),
        ("0 2 * * 0", "2026-03-08T02:00"),
        ("0 2 * * 7", "2026-03-08T02:00"),
        ("0 2 * * 0-3", "2026-03-08T02:00"),
        ("0 2 * * 5-7", "2026-03-06T02:00"),
        ("0 2 * * 1,6", "2026-03-07T02:00"),
        ("0 2 * * mon-tue", "2026-03-09T02:00"),
        ("0 2 1 */2 *", "2026-05-01T02:00"),
    ],
)
def test_expressions_mean_what_cron_means_by_them(expression: str, found: str) -> None:
    assert NightSchedule(expression, UTC).next(at("2026-03-04T12:00")) == at(found)  # a Wednesday


@pytest.mark.parametrize("expression", ["", "every night", "0 2 * *", "61 2 * * *", "0 2 * * 8", "0 2 * * 5-1"])
def test_what_is_no_cron_expression_is_refused(expression: str) -> None:
    with pytest.raises(ScheduleError, match="expected a cron expression of five fields"):
        NightSchedule(expression, UTC)


def test_a_date_that_never_comes_has_no_next() -> None:
    assert NightSchedule("0 2 30 2 *", UTC).next(at("2026-03-04T12:00")) is None


def test_it_is_due_from_its_moment_on_and_until_it_was() -> None:
    last = at("2026-03-04T02:00")
    assert NIGHTLY.due(at("2026-03-05T01:59"), last) is None
    assert NIGHTLY.due(at("2026-03-05T02:00"), last) == at("2026-03-05T02:00")
    assert NIGHTLY.due(at("2026-03-05T09:00"), last) == at("2026-03-05T02:00"), "slept over it"
    assert NIGHTLY.due(at("2026-03-05T09:00"), at("2026-03-05T02:00")) is None


def test_nights_that_were_slept_through_are_one_and_not_too_late() -> None:
    assert NIGHTLY.due(at("2026-03-09T09:00"), at("2026-03-04T02:00")) == at("2026-03-09T02:00")
    assert NIGHTLY.due(at("2026-03-09T23:00"), at("2026-03-04T02:00")) is None
    assert NightSchedule("0 * * * *", UTC).due(at("2026-03-09T09:30"), None) == at("2026-03-09T09:00")


@pytest.mark.parametrize(
    ("day", "expression", "nights"),
    [
        ("2026-03-29", "30 2 * * *", ["2026-03-28T01:30", "2026-03-29T01:30", "2026-03-30T00:30"]),
        ("2026-10-25", "30 2 * * *", ["2026-10-24T00:30", "2026-10-25T00:30", "2026-10-26T01:30"]),
        ("2026-10-25", "0 2 * * *", ["2026-10-24T00:00", "2026-10-25T00:00", "2026-10-26T01:00"]),
    ],
)
def test_one_night_a_day_where_clocks_are_changed(day: str, expression: str, nights: list[str]) -> None:
    schedule, begun = NightSchedule(expression, BERLIN), list[datetime]()
    now = at(f"{day}T00:00") - timedelta(days=1)
    last = now - timedelta(hours=12)
    for _ in range(3 * 24 * 4):
        due = schedule.due(now, last)
        if due is not None:
            last = due
            begun.append(due)
        now += timedelta(minutes=15)
    assert begun == [at(night) for night in nights]


class World:
    """A journal, and a watch that looks when it is told to."""

    def __init__(self, path: Path) -> None:
        self.now = at("2026-03-04T12:00")
        self.database = Database(sqlite_url(path / "catalog.sqlite"))
        self.begun: list[datetime] = []
        self.schedule: NightSchedule | None = NIGHTLY

    def look(self, now: str) -> None:
        """As a process that has just been started does: nothing is remembered but the journal."""
        self.now = at(now)
        journal = Journal(self.database, now=lambda: self.now)

        def begin(planned_at: datetime) -> None:
            if journal.begin_night(planned_at) is not None:
                self.begun.append(planned_at)

        NightWatch(lambda: self.schedule, last=journal.last_night, begin=begin, now=lambda: self.now).look()


@pytest.mark.parametrize(
    "clock",
    [
        ["2026-03-05T01:59", "2026-03-05T02:00", "2026-03-05T02:01"],
        ["2026-03-05T01:00", "2026-03-05T08:00", "2026-03-05T08:01"],  # slept over 02:00
        ["2026-03-05T02:00", "2026-03-05T01:30", "2026-03-05T02:00", "2026-03-05T02:30"],  # put back an hour
        ["2026-03-05T02:00", "2026-03-04T02:30", "2026-03-05T02:10"],  # put back nearly a day
        ["2026-03-05T01:30", "2026-03-05T03:30", "2026-03-05T01:40", "2026-03-05T02:00"],  # forward, and back again
    ],
)
def test_the_night_runs_once_whatever_the_clock_does(tmp_path: Path, clock: list[str]) -> None:
    world = World(tmp_path)
    for moment in clock:
        world.look(moment)
    assert [night for night in world.begun if night == at("2026-03-05T02:00")] == [at("2026-03-05T02:00")]
    world.database.close()


def test_a_night_of_the_far_future_keeps_no_other_from_beginning(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.look("2036-03-05T02:00")
    world.look("2026-03-05T02:00")
    assert world.begun == [at("2036-03-05T02:00"), at("2026-03-05T02:00")]
    world.database.close()


def test_without_a_schedule_nothing_is_due(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.schedule = None
    world.look("2026-03-05T02:00")
    assert world.begun == []
    world.database.close()


@pytest.mark.usefixtures("no_leaked_threads")
def test_the_watch_resumes_looks_and_outlives_a_bad_night() -> None:
    calls, often = list[str](), threading.Event()

    def resume() -> None:
        calls.append("resume")

    def begin(planned_at: datetime) -> None:
        calls.append("begin")
        if calls.count("begin") == 3:
            often.set()
        raise RuntimeError("a bad night")

    now = at("2026-03-05T02:00")
    watch = NightWatch(lambda: NIGHTLY, last=lambda _: None, begin=begin, resume=resume, now=lambda: now, poll_s=0.001)
    watch.start()
    assert often.wait(10)
    watch.close()
    assert calls[:4] == ["resume", "begin", "resume", "begin"]
