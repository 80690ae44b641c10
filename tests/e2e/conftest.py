"""One run of the demo, as a user starts it, shared by the tests that read its output."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest


@dataclass(frozen=True, kw_only=True)
class DemoRun:
    """What a run of `arrowmoe demo` printed, and where it kept its homes while it ran."""

    directory: Path
    code: int
    output: str
    errors: str

    def processes_left(self) -> list[str]:
        """Command lines of processes that still work in one of the homes."""
        return processes_in(self.directory)


def processes_in(directory: Path) -> list[str]:
    """Command lines that name `directory`; asking for one may fail if the process ends meanwhile."""
    lines = (" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))
    return [line for line in lines if str(directory) in line]


def demo_environment(directory: Path) -> dict[str, str]:
    """The user's, but with temporary homes under `directory`; setting ARROWMOE_HOME must change nothing."""
    return os.environ | {"TMPDIR": str(directory), "ARROWMOE_HOME": str(directory / "never")}


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    """Without its night, which takes minutes."""
    return run_demo(tmp_path_factory.mktemp("demo"), "--fast", timeout_s=280)


def run_demo(directory: Path, *options: str, timeout_s: float) -> DemoRun:
    done = subprocess.run(
        [sys.executable, "-m", "arrowmoe", "demo", *options],
        env=demo_environment(directory),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return DemoRun(directory=directory, code=done.returncode, output=done.stdout, errors=done.stderr)
