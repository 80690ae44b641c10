"""The journal: nights that begin once, jobs that one process holds, progress and notes; on every database."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from evolution.errors import JobError
from evolution.journal import DONE, FAILED, LEASE_S, MAX_ATTEMPTS, RETRY_S, Journal
from registry.database import Database
from tests.evolution.nights import Clock

NIGHT = datetime(2026, 3, 1, 2, tzinfo=UTC)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def owned(database: Database, clock: Clock) -> Callable[[str], Journal]:
    return lambda owner: Journal(database, now=clock.now, owner=owner)


@pytest.fixture
def journal(owned: Callable[[str], Journal]) -> Journal:
    return owned("a")


def queue(journal: Journal, *keys: str, **fields: object) -> None:
    for key in keys:
        journal.enqueue(key, "grow", "tiny", spec={"gap": 1}, **fields)


def test_a_night_begins_once_however_many_try(database: Database) -> None:
    numbers, gate = list[int | None](), threading.Barrier(8)

    def begin() -> None:
        gate.wait()
        numbers.append(Journal(database).begin_night(NIGHT))

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers, key=lambda one: one is None)[1:] == [None] * 7
    assert numbers.count(None) == 7


def test_a_night_tells_when_it_was_and_what_came_of_it(journal: Journal, clock: Clock) -> None:
    first = journal.begin_night(NIGHT)
    assert first is not None
    clock.pass_(hours=1)
    journal.end_night(first, "done", {"published": ["sums@1"]})
    journal.begin_night(NIGHT + timedelta(days=1))
    later, earlier = journal.nights()
    assert (earlier.planned_at, earlier.started, earlier.ended) == (NIGHT, NIGHT, NIGHT + timedelta(hours=1))
    assert (earlier.state, earlier.report) == ("done", {"published": ["sums@1"]})
    assert (later.state, later.ended) == ("running", None)
    assert journal.last_night(NIGHT + timedelta(hours=3)) == NIGHT
    assert journal.last_night(NIGHT - timedelta(hours=3)) is None


def test_gaps_are_entered_settled_and_found_by_state(journal: Journal) -> None:
    row = {"base": "tiny", "name": "sums", "theme": {"name": "sums"}, "size": 9, "worth": 2.5, "state": "open"}
    gap = journal.enter_gap(None, row | {"why": "no card fits"})
    journal.settle_gap(gap, "published", "as sums@1", card="blake3:12")
    found = journal.gap(gap)
    assert (found.name, found.state, found.why, found.card) == ("sums", "published", "as sums@1", "blake3:12")
    assert journal.gaps(state="open") == []
    assert journal.gaps(state="published") == [found]
    with pytest.raises(JobError, match="no gap has number 77"):
        journal.gap(77)


def test_the_most_urgent_job_is_taken_first_and_of_equals_the_oldest(journal: Journal) -> None:
    queue(journal, "night-1/b", "night-1/c", priority=1)
    queue(journal, "night-1/a", priority=9)
    journal.enqueue("night-1/other", "grow", "other", priority=5, spec={})
    queue(journal, "night-10/x", priority=99)
    urgent = journal.claim(keys="night-1/", base="tiny")
    assert urgent is not None
    assert urgent.key == "night-1/a"
    keys = []
    while (job := journal.claim(keys="night-1/")) is not None:
        keys.append(job.key)
    assert keys == ["night-1/other", "night-1/b", "night-1/c"]


def test_a_known_key_is_no_second_job(journal: Journal) -> None:
    queue(journal, "a", stage="teach")
    job = journal.claim()
    assert job is not None
    journal.finish(job, card="c")
    assert journal.enqueue("a", "grow", "tiny", stage="teach", spec={}).state == DONE
    assert journal.claim() is None


def test_a_job_is_held_by_one(owned: Callable[[str], Journal], journal: Journal, clock: Clock) -> None:
    queue(journal, "a")
    job = journal.claim()
    assert job is not None
    assert owned("b").claim() is None
    assert not owned("b").is_free(keys="a")
    clock.pass_(seconds=LEASE_S - 1)
    journal.advance(job, "train")
    clock.pass_(seconds=LEASE_S - 1)
    assert owned("b").claim() is None, "an entry renews the lease"


def test_a_lease_that_ended_is_taken_over_and_whoever_lost_it_is_told(
    owned: Callable[[str], Journal], journal: Journal, clock: Clock
) -> None:
    queue(journal, "a")
    lost = journal.claim()
    assert lost is not None
    journal.advance(lost, "train", examples=3)
    clock.pass_(seconds=LEASE_S)
    taken = owned("b").claim()
    assert taken is not None
    assert (taken.stage, taken.outcome, taken.attempts) == ("train", {"examples": 3}, 2)
    for write in (
        lambda: journal.advance(lost, "examine"),
        lambda: journal.finish(lost),
        lambda: journal.fail(lost, "no"),
        lambda: journal.release(lost),
    ):
        with pytest.raises(JobError, match="was taken over: it is held by b"):
            write()
    assert owned("b").finish(taken).state == DONE
    with pytest.raises(JobError, match="held by nobody"):
        journal.finish(lost)


def test_a_lease_whose_end_came_but_that_nobody_took_still_holds(journal: Journal, clock: Clock) -> None:
    queue(journal, "a")
    job = journal.claim()
    assert job is not None
    clock.pass_(hours=3)
    assert journal.finish(job).state == DONE


def test_one_of_many_threads_gets_a_job(database: Database, journal: Journal) -> None:
    queue(journal, *[f"job-{number}" for number in range(12)])
    taken, gate = list[str](), threading.Barrier(6)

    def work(owner: str) -> None:
        mine = Journal(database, now=lambda: NIGHT, owner=owner)
        gate.wait()
        while (job := mine.claim()) is not None:
            taken.append(job.key)

    threads = [threading.Thread(target=work, args=(str(number),)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(f"job-{number}" for number in range(12))


def test_a_dead_process_holds_nothing(catalog_url: str, journal: Journal) -> None:
    queue(journal, "a")
    held = """
import os, sys
from evolution.journal import Journal
from registry.database import Database
assert Journal(Database(sys.argv[1])).claim(keys="a") is not None
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", held, catalog_url], check=False).returncode == -9
    job = journal.claim()
    assert job is not None
    assert job.attempts == 2


def test_a_process_that_lives_keeps_what_it_holds(database: Database, journal: Journal) -> None:
    queue(journal, "a")
    assert Journal(database, now=lambda: NIGHT).claim() is not None
    assert journal.claim() is None


def test_a_failed_attempt_is_tried_again_later_and_not_for_ever(journal: Journal, clock: Clock) -> None:
    queue(journal, "a")
    for attempt in range(1, MAX_ATTEMPTS + 1):
        job = journal.claim()
        assert job is not None
        assert job.attempts == attempt
        job = journal.fail(job, f"trouble {attempt}")
        assert journal.claim() is None
        clock.pass_(seconds=RETRY_S * 2 ** (attempt - 1))
    assert (job.state, job.outcome["error"]) == (FAILED, "trouble 4")
    assert journal.claim() is None


def test_a_job_whose_process_always_dies_is_given_up(owned: Callable[[str], Journal], clock: Clock) -> None:
    queue(owned("a"), "a")
    for attempt in range(MAX_ATTEMPTS):
        assert owned(str(attempt)).claim() is not None
        clock.pass_(seconds=LEASE_S)
    assert owned("z").claim() is None
    [job] = owned("z").jobs()
    assert (job.state, job.outcome["error"]) == (FAILED, "its process died in each of 4 attempts")


def test_a_job_that_is_given_back_has_not_been_tried(journal: Journal) -> None:
    queue(journal, "a")
    for _ in range(2 * MAX_ATTEMPTS):
        job = journal.claim()
        assert job is not None
        assert job.attempts == 1
        journal.release(job)


def test_jobs_may_be_left_out(journal: Journal) -> None:
    queue(journal, "a", "b")
    first, second = journal.jobs()[::-1]
    found = journal.claim(without={first.id})
    assert found is not None
    assert found.id == second.id
    assert journal.claim(without={first.id}) is None
    assert journal.is_free(keys="a")


def test_a_lease_is_renewed_while_work_lasts(
    journal: Journal, owned: Callable[[str], Journal], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evolution.journal.LEASE_S", 0.06)
    queue(journal, "a")
    job = journal.claim()
    assert job is not None
    with journal.renewing(job):
        clock.pass_(seconds=30)
        renewed = threading.Event()
        renewed.wait(0.5)
        assert owned("b").claim() is None
    clock.pass_(seconds=30)
    assert owned("b").claim() is not None


def test_steps_done_again_replace_the_first(journal: Journal) -> None:
    queue(journal, "a")
    job = journal.claim()
    assert job is not None
    for step, loss in ((1, 3.0), (2, 2.0), (2, 1.5)):
        journal.step(job, "train-1", step, 3, loss)
    assert [(one.step, one.loss_nats) for one in journal.steps(job.id)] == [(1, 3.0), (2, 1.5)]


def test_notes_are_kept_and_replaced(journal: Journal) -> None:
    assert journal.note("alpha:tiny") is None
    journal.keep_note("alpha:tiny", {"tests": 1})
    journal.keep_note("alpha:tiny", {"tests": 2})
    assert journal.note("alpha:tiny") == {"tests": 2}
