"""Where a training runs: a child process here; another machine later, from the same job file.

A training that was ended, by whatever, goes on from its checkpoint when it is run again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final, Protocol

from evolution.errors import BudgetSpentError, TrainingError
from evolution.leash import leashed
from evolution.training_job import OnStep, ProgressTail, Step, Trained, TrainingJob, read_trained
from registry.logs import get_logger

TRAIN: Final = (sys.executable, "-m", "arrowmoe.training")
STDERR_TAIL_BYTES: Final = 2000

Cancelled = Callable[[], bool]

log = get_logger(__name__)


class Executor(Protocol):
    """Runs training jobs."""

    def run(
        self,
        job_path: Path,
        *,
        on_progress: OnStep,
        deadline_s: float | None = None,
        cancelled: Cancelled | None = None,
    ) -> Trained:
        """Run a job to its end, at most `deadline_s` from now.

        Raises `BudgetSpentError` when the time is over, and `TrainingError` when it fails or `cancelled()` says so.
        """


class LocalProcess:
    """Runs a job as `command` + the job file, in a process and session of its own that ends with this one.

    `memory_bytes` is the most that the process may hold in memory; `None`: whatever there is. Raises `TrainingError`
    with the end of what the process wrote on stderr.
    """

    def __init__(self, command: Sequence[str] = TRAIN, *, memory_bytes: int | None = None, poll_s: float = 0.1) -> None:
        self._command, self._memory_bytes, self._poll_s = tuple(command), memory_bytes, poll_s

    def run(
        self,
        job_path: Path,
        *,
        on_progress: OnStep,
        deadline_s: float | None = None,
        cancelled: Cancelled | None = None,
    ) -> Trained:
        """Run a job to its end, at most `deadline_s` from now."""
        job = TrainingJob.load(job_path)
        limits = _Limits(deadline_s, cancelled)
        tail = ProgressTail(job.output)
        with tempfile.TemporaryFile() as stderr, _started([*self._command, str(job_path)], stderr) as child:
            while _running(child, self._poll_s):
                _forward(tail, on_progress)
                limits.check()
                self._check_memory(child)
            _forward(tail, on_progress)
            if child.returncode != 0:
                raise TrainingError(f"expected the training to end well, got {_ending(child)}: {_last_words(stderr)}")
        trained = read_trained(job.output, job.fingerprint())
        if trained is None:
            raise TrainingError(
                "expected an adapter of a training that ended well, got none", hint=" ".join(self._command)
            )
        return trained

    def _check_memory(self, child: subprocess.Popen[bytes]) -> None:
        held = _held_bytes(child.pid)
        if self._memory_bytes is not None and held > self._memory_bytes:
            raise TrainingError(
                f"expected at most {self._memory_bytes:,} bytes of memory, got {held:,}, so the training was ended",
                hint="raise accumulate, which computes a batch in parts, or allow more memory",
            )


class InProcess:
    """Runs a job in this process; `train` is `arrowmoe.training.train_from_file`, or what a test puts in its place."""

    def __init__(self, train: Callable[[Path, OnStep], Trained]) -> None:
        self._train = train

    def run(
        self,
        job_path: Path,
        *,
        on_progress: OnStep,
        deadline_s: float | None = None,
        cancelled: Cancelled | None = None,
    ) -> Trained:
        """Run a job to its end; time and `cancelled` are looked at after each step."""
        limits = _Limits(deadline_s, cancelled)

        def on_step(step: Step) -> None:
            on_progress(step)
            limits.check()

        return self._train(job_path, on_step)


class _Limits:
    def __init__(self, deadline_s: float | None, cancelled: Cancelled | None) -> None:
        self._deadline_s, self._cancelled, self._began_s = deadline_s, cancelled, time.monotonic()

    def check(self) -> None:
        if self._deadline_s is not None and time.monotonic() - self._began_s > self._deadline_s:
            raise BudgetSpentError(
                f"expected the training to take at most {self._deadline_s:.0f} s, so it was ended before it was done",
                hint="run it again; it goes on from its last checkpoint",
            )
        if self._cancelled is not None and self._cancelled():
            raise TrainingError("the training was cancelled", hint="run it again; it goes on from its last checkpoint")


@contextmanager
def _started(command: Sequence[str], stderr: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is gone at the end of the block."""
    child = subprocess.Popen(
        leashed(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        start_new_session=True,
    )
    log.info("training_started", pid=child.pid)
    try:
        yield child
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _running(child: subprocess.Popen[bytes], wait_s: float) -> bool:
    try:
        child.wait(timeout=wait_s)
    except subprocess.TimeoutExpired:
        return True
    return False


def _forward(tail: ProgressTail, on_progress: OnStep) -> None:
    for step in tail.new():
        on_progress(step)


def _held_bytes(pid: int) -> int:
    """Resident memory; 0 for a process that just ended."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if pages else 0


def _ending(child: subprocess.Popen[bytes]) -> str:
    code = child.returncode
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _last_words(stderr: IO[bytes]) -> str:
    end = stderr.seek(0, os.SEEK_END)
    stderr.seek(max(0, end - STDERR_TAIL_BYTES))
    return stderr.read().decode(errors="replace").strip() or "it said nothing"


__all__ = ["TRAIN", "Cancelled", "Executor", "InProcess", "LocalProcess"]
