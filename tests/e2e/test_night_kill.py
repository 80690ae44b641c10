"""A process is killed in the middle of a training: its child ends, the next start goes on, one card comes of it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from arrowmoe.settings import EvolutionSettings
from arrowmoe.signalling import signal_store
from evolution.journal import Journal
from registry.store import Registry
from tests.arrowmoe.nodes import ROOT, environment, save_tiny_models
from tests.e2e.conftest import processes_in
from tests.e2e.night_home import STEPS, traffic
from tests.e2e.night_home import main as carry_on


def started(home: Path, model: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.e2e.night_home", str(home), str(model)]
    return subprocess.Popen(command, cwd=ROOT, env=environment(home), stderr=subprocess.PIPE)


def until(true: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        assert process.poll() is None, (process.communicate()[1] or b"").decode()[-3000:]
        time.sleep(0.02)


@pytest.mark.e2e
def test_killed_in_the_middle_of_a_training_the_night_goes_on_and_publishes_once(
    tmp_path: Path, empty_home: Path
) -> None:
    home, (model, _) = tmp_path / "home", save_tiny_models(tmp_path)
    shutil.copytree(empty_home, home)
    with Registry.open(home) as registry:
        signal_store(registry.database, EvolutionSettings()).record_all(traffic())

    def taken() -> int:
        logs = [*home.glob("nights/*/trained-1/progress.jsonl")]
        return logs[0].read_bytes().count(b'"train"') if logs else 0

    with started(home, model) as killed:
        until(lambda: taken() >= 60, killed)
        killed.send_signal(signal.SIGKILL)
    until_gone = time.monotonic() + 10
    while processes_in(home) and time.monotonic() < until_gone:
        time.sleep(0.02)
    assert processes_in(home) == [], "the training ends with whoever began it"
    assert taken() < STEPS
    with Registry.open(home) as registry:
        assert registry.list() == []
        [night] = Journal(registry.database).nights()
        assert night.ended is None

    carry_on(home, model)
    with Registry.open(home) as registry:
        journal = Journal(registry.database)
        [night], [gap] = journal.nights(), journal.gaps()
        assert gap.state == "published", gap.why
        assert (night.state, len(night.report["published"])) == ("done", 1)
        assert [entry.digest for entry in registry.list()] == [gap.card]
        [grown] = [job for job in journal.jobs() if job.kind == "grow"]
        assert grown.attempts == 2
        verdict = grown.outcome["verdict"]
        assert verdict["accuracy"]["candidate"] > verdict["accuracy"]["base"] + 0.5
        assert len([step for step in journal.steps(grown.id) if step.phase == "train-1"]) >= STEPS - 60
    lines = [json.loads(line) for line in next(home.glob("nights/*/trained-1/progress.jsonl")).read_text().splitlines()]
    steps = [line["step"] for line in lines if line["phase"] == "train"]
    assert steps.count(1) == 1, "it went on from its checkpoint"
