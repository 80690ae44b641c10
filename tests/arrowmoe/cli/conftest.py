"""Running one command line in this process."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from arrowmoe.cli.main import run
from arrowmoe.logs import logging_to
from arrowmoe.settings import LogSettings


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its result, printed as JSON."""
        assert self.code == 0, self.err
        return json.loads(self.out)


Cli = Callable[..., Ran]


@pytest.fixture
def cli(home: Path, clean_environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """Runs `arrowmoe ARGS` on this test's home."""
    clean_environment.setenv("ARROWMOE_HOME", str(home))
    clean_environment.setenv("ARROWMOE_DISCOVERY", "0")

    def call(*args: str | Path) -> Ran:
        code = run([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Ran(code=code, out=captured.out, err=captured.err)

    with logging_to(LogSettings(file=False), stream=io.StringIO()):  # a node of the test's own logs there
        yield call
