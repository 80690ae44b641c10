"""What time it is. Everything that asks is given the clock, so that a test can give another."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

Now = Callable[[], datetime]


def utc_now() -> datetime:
    """This moment, aware and in UTC."""
    return datetime.now(UTC)


__all__ = ["Now", "utc_now"]
