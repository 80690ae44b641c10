"""What the global options say. Light: `--help` and completion import no more than this."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from arrowmoe.cli.output import Output


@dataclass(kw_only=True)
class Invocation:
    """One command line's global options."""

    out: Output = field(default_factory=Output)
    home: str | None = None
    config: Path | None = None
