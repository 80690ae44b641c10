"""Loggers for all floors: structlog events that go through the standard library's logging, so that a library is quiet.

Nothing is printed unless the program that uses arrowmoe sets up logging; `arrowmoe.logs` does so for the command line.
structlog's own global configuration is left to that program.
"""

from __future__ import annotations

import logging

import structlog
from structlog.stdlib import BoundLogger
from structlog.typing import Processor

SHARED: tuple[Processor, ...] = (
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
)

# Where bitsandbytes is installed PEFT imports it, and it then warns at every command that a speed-up is not.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def get_logger(name: str) -> BoundLogger:
    """The logger of one module; events have a name and fields."""
    logger: BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        wrapper_class=BoundLogger,
        processors=[
            structlog.stdlib.filter_by_level,
            *SHARED,
            structlog.processors.StackInfoRenderer(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
    )
    return logger
