"""A process that dies -9 at a chosen one of the moments at which it writes."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from registry.database import Database


def caller() -> str:
    """The function of `evolution` that is writing."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent.name == "evolution" and path.parent.parent.name != "tests":
            return frame.f_code.co_name
        frame = frame.f_back
    return "nobody"


@contextmanager
def failpoints(kill_at: int | None, log: Path | None) -> Iterator[None]:
    """Count what is written: each transaction, rename and training step, before and after; die -9 at one of them."""
    count = 0

    def point(what: str) -> None:
        nonlocal count
        count += 1
        if log is not None:
            with log.open("a") as file:
                file.write(f"{what}\n")
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    writing, replace, path_replace = Database.writing, os.replace, Path.replace

    @contextmanager
    def pointed_writing(self: Database) -> Iterator[Any]:
        where = caller()
        point(f"before {where}")
        with writing(self) as session:
            yield session
        point(f"after {where}")

    def pointed(real: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(source: Any, target: Any, **options: Any) -> Any:
            point(f"before {Path(target).suffix}")
            made = real(source, target, **options)
            point(f"after {Path(target).suffix}")
            return made

        return replaced

    Database.writing = pointed_writing  # type: ignore[method-assign]
    os.replace, Path.replace = pointed(replace), pointed(path_replace)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        Database.writing = writing  # type: ignore[method-assign]
        os.replace, Path.replace = replace, path_replace  # type: ignore[assignment,method-assign]


def in_a_child(work: Callable[[], None]) -> int:
    """How a process that does `work` ended: 0, or the number of the signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
