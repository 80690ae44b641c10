"""A training in a process of its own: it reports, it is held to its limits, it never outlives whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from evolution.errors import BudgetSpentError, TrainingError
from evolution.executors import Executor, InProcess, LocalProcess
from evolution.trainer import ExpertTrainer
from evolution.training_job import OnStep, Step, Trained, TrainingJob
from tests.arrowmoe.tiny import tokenizer
from tests.evolution.jobs import job
from tests.peft_models import tiny_llama

FAKE = Path(__file__).with_name("fake_training.py")
PARENT = """
import sys
from pathlib import Path
from evolution.executors import LocalProcess
LocalProcess([sys.executable, sys.argv[1], "hang"]).run(Path(sys.argv[2]), on_progress=lambda step: None)
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    job(tmp_path).save(tmp_path / "job.json")
    return tmp_path / "job.json"


def fake(behaviour: str, **limits: int) -> LocalProcess:
    return LocalProcess([sys.executable, str(FAKE), behaviour], poll_s=0.02, **limits)


def ignore(_: Step) -> None:
    pass


def gone(spec: Path) -> bool:
    """Whether the process that ran a job is no more."""
    pid = int((spec.parent / "out" / "pid").read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def in_process(path: Path, on_step: OnStep) -> Trained:
    return ExpertTrainer(TrainingJob.load(path), tiny_llama(), tokenizer()).run(on_step)


@pytest.mark.parametrize("executor", [fake("good"), InProcess(in_process)])
def test_progress_is_told_and_the_adapter_handed_back(spec: Path, executor: Executor) -> None:
    seen: list[Step] = []
    trained = executor.run(spec, on_progress=seen.append)
    assert trained.adapter_dir == spec.parent / "out" / "adapter"
    assert [step.step for step in seen] == list(range(1, trained.steps + 1))
    assert tuple(step.loss_nats for step in seen) == trained.losses_nats


@pytest.mark.parametrize("executor", [fake("hang"), InProcess(in_process)])
def test_time_and_whoever_cancels_end_it(spec: Path, executor: Executor) -> None:
    with pytest.raises(BudgetSpentError, match="at most 0 s"):
        executor.run(spec, on_progress=ignore, deadline_s=0.4 if isinstance(executor, LocalProcess) else 0)
    seen: list[Step] = []
    with pytest.raises(TrainingError, match="was cancelled"):
        executor.run(spec, on_progress=seen.append, cancelled=lambda: len(seen) > 1)
    assert isinstance(executor, InProcess) or gone(spec)


def test_memory_ends_it(spec: Path) -> None:
    with pytest.raises(TrainingError, match="at most 209,715,200 bytes of memory"):
        fake("eat", memory_bytes=200 << 20).run(spec, on_progress=ignore, deadline_s=30)
    assert gone(spec)


def test_its_last_words_are_kept(spec: Path) -> None:
    with pytest.raises(TrainingError, match="exit code 3") as caught:
        fake("fail").run(spec, on_progress=ignore)
    assert str(caught.value).endswith("the disk is full")
    assert len(str(caught.value)) < 2200


def test_a_good_end_without_an_adapter_is_none(spec: Path) -> None:
    with pytest.raises(TrainingError, match="expected an adapter"):
        fake("nothing").run(spec, on_progress=ignore)


def test_a_command_that_is_not_there_is_an_error(spec: Path) -> None:
    with pytest.raises(TrainingError, match="No such file"):
        LocalProcess(["/no/such/program"]).run(spec, on_progress=ignore)


def test_a_process_that_was_killed_says_by_what(spec: Path) -> None:
    def kill(_: Step) -> None:
        os.kill(int((spec.parent / "out" / "pid").read_text()), signal.SIGKILL)

    with pytest.raises(TrainingError, match="signal SIGKILL"):
        fake("hang").run(spec, on_progress=kill, deadline_s=30)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_when_its_parent_is_killed(spec: Path, number: int) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(FAKE), str(spec)])
    _until((spec.parent / "out" / "progress.jsonl").exists)
    parent.send_signal(number)
    parent.wait(timeout=10)
    assert gone(spec)


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
