"""README's session is what the demo prints; what differs from run to run, or from machine to machine, aside."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts import demo_session
from tests.e2e.conftest import DemoRun

README = Path(__file__).parents[2] / "README.md"
CERTAIN_CHARACTERS = 24

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("demo")]


def normal(output: str) -> list[str]:
    """Lines with ports, ids, digests and times replaced, and long answers of the bare model cut short."""
    for pattern, replacement in (
        (r"127\.0\.0\.1:\d+", "ADDRESS"),
        (r"\b[0-9a-f]{12}\b", "ID"),
        (r"\d+(?:\.\d+)? s\b", "TIME"),
        (r"\(\d+ MB/s\)", "(SPEED)"),
        (r"seconds: .*", "seconds: TIMES"),
        # Another processor may round differently, and a rambling answer then takes another way.
        (rf"(without  .{{{CERTAIN_CHARACTERS}}}).*", r"\1"),
    ):
        output = re.sub(pattern, replacement, output)
    return output.splitlines()


def until(output: str, mark: str) -> list[str]:
    """The lines before the one that begins with `mark`."""
    lines = normal(output)
    return lines[: next(at for at, line in enumerate(lines) if line.startswith(mark)) - 1]


def test_the_session_is_what_the_demo_prints(demo_run: DemoRun) -> None:
    shown = demo_session.session(README.read_text(encoding="utf-8"))
    assert until(shown, "6  A night") == until(demo_run.output, "Done in"), (
        "write it again: python -m scripts.demo_session"
    )


def test_the_session_is_replaced_and_nothing_else() -> None:
    readme = README.read_text(encoding="utf-8")
    written = demo_session.with_session(readme, "one\ntwo\n")
    assert demo_session.session(written) == "one\ntwo\n"
    assert demo_session.with_session(written, demo_session.session(readme)) == readme
