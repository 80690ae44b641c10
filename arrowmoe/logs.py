"""Logging: structlog events to stderr and, for a node, to a rotating file in its home. Stdout is for results alone.

Records of other libraries take the same road. Only a node writes the file: two processes cannot rotate one file.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TextIO

import structlog
from structlog.typing import Processor

from arrowmoe.settings import LogSettings
from registry.logs import SHARED

LOG_DIRECTORY = "logs"
LOG_FILE = "arrowmoe.log"


def log_path(home: Path) -> Path:
    """The file that the node of `home` logs to."""
    return home / LOG_DIRECTORY / LOG_FILE


@contextmanager
def logging_to(
    settings: LogSettings, *, home: Path | None = None, console_level: str | None = None, stream: TextIO | None = None
) -> Iterator[None]:
    """Send events to stderr (at `console_level`, else the setting) and, with `home`, to its file; until the exit."""
    console = logging.StreamHandler(stream or sys.stderr)
    console.setFormatter(_formatter(human=_is_human(settings, console.stream), colours=console.stream.isatty()))
    console.setLevel((console_level or settings.level).upper())
    handlers: list[logging.Handler] = [console]
    if home is not None and settings.file:
        handlers.append(_file_handler(settings, log_path(home)))
    root = logging.getLogger()
    before = root.level
    root.setLevel(min(handler.level for handler in handlers))
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            if handler is not console:
                handler.close()
        root.setLevel(before)


def _file_handler(settings: LogSettings, path: Path) -> logging.Handler:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handler = RotatingFileHandler(
        path, maxBytes=settings.file_bytes, backupCount=settings.file_count, encoding="utf-8", delay=True
    )
    handler.setFormatter(_formatter(human=False, colours=False))
    handler.setLevel(settings.level.upper())
    return handler


def _formatter(*, human: bool, colours: bool) -> logging.Formatter:
    if human:
        rendered: list[Processor] = [structlog.dev.ConsoleRenderer(colors=colours)]
    else:
        rendered = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=SHARED,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendered],
    )


def _is_human(settings: LogSettings, stream: TextIO) -> bool:
    return settings.format == "human" or (settings.format == "auto" and stream.isatty())


__all__ = ["LOG_DIRECTORY", "LOG_FILE", "log_path", "logging_to"]
