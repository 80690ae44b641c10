"""kill -9 wherever a night writes: it goes on to the same end."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

from evolution.journal import DONE
from evolution.survey import LAPSED, PUBLISHED
from tests.evolution.failpoints import failpoints, in_a_child
from tests.evolution.nights import (
    BASE,
    TOPIC,
    TWO_O_CLOCK,
    home_at,
    prompts,
)


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
