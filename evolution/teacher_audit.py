"""What was said to teachers: a row is written before a request leaves, and completed by what comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select

from evolution.tables import TeacherCallRow
from registry.database import Database


@dataclass(frozen=True, kw_only=True)
class TeacherCall:
    """An exchange; `request` is the body that left, word for word. Without response and error it never ended."""

    created: datetime
    teacher: str
    purpose: str
    disclosure: str
    request: str
    response: str | None
    error: str | None
    prompt_tokens: int
    completion_tokens: int
    microusd: int
    seconds: float


_FIELDS = tuple(TeacherCall.__dataclass_fields__)


class TeacherAudit:
    """The exchanges of one account."""

    def __init__(self, database: Database, account: str, *, now: Callable[[], datetime]) -> None:
        self._database, self._account, self._now = database, account, now

    def begin(self, *, teacher: str, purpose: str, disclosure: str, request: str) -> int:
        """Note what is about to leave; returns the exchange's number."""
        row = TeacherCallRow(
            account=self._account,
            created=self._now(),
            teacher=teacher,
            purpose=purpose,
            disclosure=disclosure,
            request=request,
            prompt_tokens=0,
            completion_tokens=0,
            microusd=0,
            seconds=0.0,
        )
        with self._database.writing() as session:
            session.add(row)
            session.flush()
            return row.id

    def end(
        self,
        number: int,
        *,
        response: str | None,
        error: str | None,
        prompt_tokens: int,
        completion_tokens: int,
        microusd: int,
        seconds: float,
    ) -> None:
        """Note what came back, and what it was charged at."""
        with self._database.writing() as session:
            row = session.get_one(TeacherCallRow, number)
            row.response, row.error = response, error
            row.prompt_tokens, row.completion_tokens = prompt_tokens, completion_tokens
            row.microusd, row.seconds = microusd, seconds

    def calls(self) -> list[TeacherCall]:
        """All exchanges, oldest first."""
        mine = select(TeacherCallRow).where(TeacherCallRow.account == self._account).order_by(TeacherCallRow.id)
        with self._database.reading() as session:
            return [TeacherCall(**{name: getattr(row, name) for name in _FIELDS}) for row in session.scalars(mine)]


__all__ = ["TeacherAudit", "TeacherCall"]
