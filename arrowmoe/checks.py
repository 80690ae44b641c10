"""What a check of the doctor's says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding; `hint` says what to do about it."""

    name: str
    status: Status
    detail: str
    hint: str | None = None


__all__ = ["Check", "Status"]
