"""The one place that prints. Results go to stdout: for people, as JSON, or as bare values; all else goes to stderr.

What a card, a peer or a model says is never trusted with the terminal: control characters, and those that turn the
direction of writing, are replaced; nothing of it is read as markup.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

Mode = Literal["human", "json", "quiet"]
Advance = Callable[[str, float, float], None]
"""Text, done and total so far; a total of 0 means nobody knows."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_WIDE = 160


def clean(text: object) -> str:
    """`text` without characters that steer a terminal."""
    return _CONTROL.sub("�", str(text))


class Output:
    """Where a command's words go, in one of three modes."""

    def __init__(self, mode: Mode = "human") -> None:
        self.mode = mode

    def result(self, data: Any, human: Callable[[], None], quiet: Iterable[object] = ()) -> None:
        """The command's result: `data` as JSON, what `human` prints, or the lines of `quiet`."""
        if self.mode == "json":
            json.dump(data, sys.stdout, ensure_ascii=False, indent=2, allow_nan=False)
            sys.stdout.write("\n")
        elif self.mode == "human":
            human()
        else:
            for value in quiet:
                self.line(value)
        sys.stdout.flush()

    def line(self, text: object = "", style: str = "") -> None:
        """A line of a result."""
        _console(sys.stdout).print(Text(clean(text), style=style), soft_wrap=True)

    def fields(self, rows: Iterable[tuple[str, object]]) -> None:
        """Names and values, one pair a line; a value of None or "" is left out, one of several lines is indented."""
        shown = [(name, value) for name, value in rows if value not in (None, "", [])]
        width = max((len(name) for name, _ in shown), default=0)
        for name, value in shown:
            self.line(f"{name.ljust(width)}  {_indented(str(value), width + 2)}")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> None:
        """A table; `empty` is said instead where it has no rows. Columns ending in `>` are numbers."""
        listed = list(rows)
        if not listed:
            self.line(empty)
            return
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for column in columns:
            table.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
        for row in listed:
            table.add_row(*(Text(clean(value)) for value in row))
        _console(sys.stdout).print(table)

    def note(self, text: str) -> None:
        """Something worth knowing that is no result."""
        if self.mode == "human":
            _console(sys.stderr).print(Text(clean(text), style="dim"), soft_wrap=True)

    def warning(self, text: str, hint: str) -> None:
        """Something that needs somebody, though nothing failed; JSON says it in the result."""
        if self.mode != "json":
            console = _console(sys.stderr)
            console.print(Text.assemble(("warning: ", "bold yellow"), clean(text)), soft_wrap=True)
            console.print(Text.assemble(("hint: ", "bold"), clean(hint)), soft_wrap=True)

    def error(self, message: str, hint: str | None = None) -> None:
        """What went wrong, and what to do."""
        console = _console(sys.stderr)
        console.print(Text.assemble(("error: ", "bold red"), clean(message)), soft_wrap=True)
        if hint:
            console.print(Text.assemble(("hint: ", "bold"), clean(hint)), soft_wrap=True)

    def traceback(self) -> None:
        """The exception in hand, in full."""
        sys.stderr.write(traceback.format_exc())

    @contextmanager
    def progress(self, text: str) -> Iterator[Advance]:
        """A bar on stderr while a person watches; otherwise nothing."""
        if self.mode != "human" or not sys.stderr.isatty():
            yield _nothing
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=_console(sys.stderr), transient=True) as bar:
            yield _advance(bar, bar.add_task(text, total=None))


def _indented(text: str, columns: int) -> str:
    """`text` whose second and later lines cannot be taken for fields."""
    return text.replace("\n", "\n" + " " * columns)


def _advance(bar: Progress, task: TaskID) -> Advance:
    def advance(text: str, done: float, total: float) -> None:
        bar.update(task, description=clean(text), completed=done, total=total or None)

    return advance


def _nothing(text: str, done: float, total: float) -> None:
    """Nobody watches."""


def _console(stream: TextIO) -> Console:
    """A console on the stream as it is now; where no person reads, lines are as wide as they need to be."""
    return Console(file=stream, highlight=False, markup=False, emoji=False, width=None if stream.isatty() else _WIDE)


def size(count: int) -> str:
    """A number of bytes for people."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def short(digest: str) -> str:
    """A digest as people read it, still long enough to be used as a reference."""
    return digest.removeprefix("blake3:")[:12]


__all__ = ["Advance", "Mode", "Output", "clean", "short", "size"]
