"""The night's tables, in the same database as the cards; the migrations of both stand in `registry/migrations`."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from registry.tables import Base


class SignalRow(Base):
    """A request that may have been answered badly. `weight` is how many requests a sampled one stands for."""

    __tablename__ = "signals"
    __table_args__ = (Index("ix_signals_created", "created"), Index("ix_signals_gap", "gap_id"))

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    created: Mapped[datetime]
    base: Mapped[str] = mapped_column(Text)
    card: Mapped[str | None] = mapped_column(String(71))
    prompt: Mapped[str] = mapped_column(Text)
    answer: Mapped[str | None] = mapped_column(Text)
    accepted: Mapped[bool]
    p_value: Mapped[float | None]
    sequence_nats: Mapped[float | None]
    tokens: Mapped[int | None]
    feedback: Mapped[str | None] = mapped_column(String(8))
    correction: Mapped[str | None] = mapped_column(Text)
    agreement: Mapped[float | None]
    weight: Mapped[float] = mapped_column(default=1.0)
    gap_id: Mapped[int | None]


class GapRow(Base):
    """A cluster of signals that no card covers, and what became of it."""

    __tablename__ = "gaps"

    id: Mapped[int] = mapped_column(primary_key=True)
    night_id: Mapped[int | None]
    created: Mapped[datetime]
    base: Mapped[str] = mapped_column(Text)
    name: Mapped[str] = mapped_column(String(96))
    theme: Mapped[dict[str, Any]] = mapped_column(JSON)
    size: Mapped[int]
    worth: Mapped[float]
    state: Mapped[str] = mapped_column(String(16))
    why: Mapped[str] = mapped_column(Text)
    card: Mapped[str | None] = mapped_column(String(71))


class NightRow(Base):
    """One night: `planned_at` is unique, so that a night is begun once however often a clock strikes."""

    __tablename__ = "nights"

    id: Mapped[int] = mapped_column(primary_key=True)
    planned_at: Mapped[datetime] = mapped_column(unique=True)
    started: Mapped[datetime]
    ended: Mapped[datetime | None]
    state: Mapped[str] = mapped_column(String(16))
    report: Mapped[dict[str, Any]] = mapped_column(JSON)


class JobRow(Base):
    """Work that a process holds by a lease, and another takes over when the lease ends."""

    __tablename__ = "jobs"
    __table_args__ = (Index("ix_jobs_state", "state", "priority"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(String(255), unique=True)
    kind: Mapped[str] = mapped_column(String(16))
    base: Mapped[str] = mapped_column(Text)
    priority: Mapped[int]
    state: Mapped[str] = mapped_column(String(16))
    stage: Mapped[str] = mapped_column(String(16))
    attempts: Mapped[int]
    owner: Mapped[str | None] = mapped_column(String(64))
    lease_until: Mapped[datetime | None]
    not_before: Mapped[datetime]
    created: Mapped[datetime]
    updated: Mapped[datetime]
    spec: Mapped[dict[str, Any]] = mapped_column(JSON)
    outcome: Mapped[dict[str, Any]] = mapped_column(JSON)


class ProgressRow(Base):
    """A step of a job's training."""

    __tablename__ = "progress"

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    phase: Mapped[str] = mapped_column(String(16), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    steps: Mapped[int]
    loss_nats: Mapped[float | None]
    at: Mapped[datetime]


class TeacherCallRow(Base):
    """An exchange with a teacher, word for word as it left the node and came back."""

    __tablename__ = "teacher_calls"

    id: Mapped[int] = mapped_column(primary_key=True)
    account: Mapped[str] = mapped_column(String(64), index=True)
    created: Mapped[datetime]
    teacher: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str] = mapped_column(String(16))
    disclosure: Mapped[str] = mapped_column(String(16))
    request: Mapped[str] = mapped_column(Text)
    response: Mapped[str | None] = mapped_column(Text)
    error: Mapped[str | None] = mapped_column(Text)
    prompt_tokens: Mapped[int]
    completion_tokens: Mapped[int]
    microusd: Mapped[int] = mapped_column(BigInteger)
    seconds: Mapped[float]


class BudgetRow(Base):
    """What an account may spend, has spent, and has promised to calls under way; money in millionths of a dollar."""

    __tablename__ = "budgets"

    account: Mapped[str] = mapped_column(String(64), primary_key=True)
    limit_microusd: Mapped[int] = mapped_column(BigInteger)
    limit_tokens: Mapped[int] = mapped_column(BigInteger)
    spent_microusd: Mapped[int] = mapped_column(BigInteger, default=0)
    spent_tokens: Mapped[int] = mapped_column(BigInteger, default=0)


class ReservationRow(Base):
    """Money and tokens promised to one call; it ends when the call is settled, or at `expires`, counted as spent."""

    __tablename__ = "reservations"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    account: Mapped[str] = mapped_column(ForeignKey("budgets.account", ondelete="CASCADE"), index=True)
    microusd: Mapped[int] = mapped_column(BigInteger)
    tokens: Mapped[int] = mapped_column(BigInteger)
    expires: Mapped[datetime]


class NoteRow(Base):
    """A value that the night remembers under a key: the combiner's weights, the share of alpha that was spent."""

    __tablename__ = "notes"

    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    value: Mapped[dict[str, Any]] = mapped_column(JSON)
