"""What the night does and has done, in SQL: nights, gaps, jobs held by leases, and the steps of a training.

A job is held by one process at a time. Who holds it renews the lease; a lease that ended, or whose process on this
machine is dead, may be taken over, and whoever lost it is told so at its next write (a fencing check by owner), so two
processes never both move one job on. No torch, no network.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Select, or_, select, update

from evolution.clock import Now, utc_now
from evolution.errors import JobError
from evolution.tables import GapRow, JobRow, NightRow, NoteRow, ProgressRow
from registry.database import Database
from registry.logs import get_logger

LEASE_S = 60.0
MAX_ATTEMPTS = 4
RETRY_S = 300.0
"""Pause before a job is tried again; doubled with each attempt."""

QUEUED, RUNNING, DONE, FAILED = "queued", "running", "done", "failed"

SCHEDULE = "schedule"
"""Note: the cron expression that the owner has set by a command; empty for none."""

_Record = TypeVar("_Record", "GapRecord", "Job", "NightRecord", "Step")
log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Work to be done; `outcome` gathers what its stages found."""

    id: int
    key: str
    kind: str
    base: str
    priority: int
    state: str
    stage: str
    attempts: int
    spec: Mapping[str, Any]
    outcome: Mapping[str, Any] = field(default_factory=dict)
    updated: datetime


@dataclass(frozen=True, kw_only=True)
class GapRecord:
    """A gap as it was found, and what became of it."""

    id: int
    base: str
    name: str
    theme: Mapping[str, Any]
    size: int
    worth: float
    state: str
    why: str
    card: str | None
    created: datetime


@dataclass(frozen=True, kw_only=True)
class NightRecord:
    """A night; `ended` is None while it lasts, or where its process died."""

    id: int
    planned_at: datetime
    started: datetime
    ended: datetime | None
    state: str
    report: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of a training, with its loss in nats per token."""

    phase: str
    step: int
    steps: int
    loss_nats: float | None
    at: datetime


class Journal:
    """The rows of one database, written as one owner."""

    def __init__(self, database: Database, *, now: Now = utc_now, owner: str | None = None) -> None:
        self._database, self._now = database, now
        self.owner = owner or _this_process()

    # Nights

    def begin_night(self, planned_at: datetime) -> int | None:
        """Enter a night; None if it was entered before. Exactly one of several processes gets its number."""
        with self._database.writing() as session:
            if session.scalar(select(NightRow.id).where(NightRow.planned_at == planned_at)) is not None:
                return None
            row = NightRow(planned_at=planned_at, started=self._now(), state=RUNNING, report={})
            session.add(row)
            session.flush()
            return row.id

    def end_night(self, night: int, state: str, report: Mapping[str, Any]) -> None:
        """Say how a night ended."""
        with self._database.writing() as session:
            values = {"ended": self._now(), "state": state, "report": dict(report)}
            session.execute(update(NightRow).where(NightRow.id == night).values(**values))

    def nights(self, limit: int = 20) -> list[NightRecord]:
        """Nights, the latest first."""
        with self._database.reading() as session:
            rows = session.scalars(select(NightRow).order_by(NightRow.planned_at.desc()).limit(limit))
            return [_record(NightRecord, row) for row in rows]

    def last_night(self, before: datetime) -> datetime | None:
        """When the latest night was planned that was planned for `before` or earlier."""
        with self._database.reading() as session:
            query = select(NightRow.planned_at).where(NightRow.planned_at <= before)
            return session.scalar(query.order_by(NightRow.planned_at.desc()).limit(1))

    # Gaps

    def enter_gap(self, night: int | None, gap: Mapping[str, Any]) -> int:
        """Enter a gap with the columns of `GapRow`."""
        with self._database.writing() as session:
            row = GapRow(night_id=night, created=self._now(), **gap)
            session.add(row)
            session.flush()
            return row.id

    def settle_gap(self, gap: int, state: str, why: str, *, card: str | None = None) -> None:
        """Say what became of a gap."""
        with self._database.writing() as session:
            session.execute(update(GapRow).where(GapRow.id == gap).values(state=state, why=why, card=card))

    def gap(self, gap: int) -> GapRecord:
        """A gap by number. Raises `JobError`."""
        with self._database.reading() as session:
            row = session.get(GapRow, gap)
            if row is None:
                raise JobError(f"no gap has number {gap}", hint="`arrowmoe evolve gaps` lists them")
            return _record(GapRecord, row)

    def gaps(self, *, state: str | None = None, limit: int = 100) -> list[GapRecord]:
        """Gaps, the latest first."""
        query = select(GapRow).order_by(GapRow.id.desc()).limit(limit)
        with self._database.reading() as session:
            rows = session.scalars(query if state is None else query.where(GapRow.state == state))
            return [_record(GapRecord, row) for row in rows]

    # Jobs

    def enqueue(
        self, key: str, kind: str, base: str, *, priority: int = 0, stage: str = "", spec: Mapping[str, Any]
    ) -> Job:
        """Add a job; the one that is there already if its key is known."""
        with self._database.writing() as session:
            row = session.scalar(select(JobRow).where(JobRow.key == key))
            if row is None:
                now = self._now()
                row = JobRow(
                    key=key,
                    kind=kind,
                    base=base,
                    priority=priority,
                    stage=stage,
                    spec=dict(spec),
                    state=QUEUED,
                    attempts=0,
                    not_before=now,
                    created=now,
                    updated=now,
                    outcome={},
                )
                session.add(row)
                session.flush()
            return _record(Job, row)

    def claim(self, *, base: str | None = None, keys: str | None = None, without: Collection[int] = ()) -> Job | None:
        """Take the most urgent job that is free (of `base`, with keys that begin with `keys`), under a lease."""
        with self._database.writing() as session:
            for row in session.scalars(_claimable(base, keys)):
                if row.id not in without and self._may_take(row) and self._take(row):
                    return _record(Job, row)
            return None

    def is_free(self, *, keys: str) -> bool:
        """Whether `claim` would find a job, or one to give up for good."""
        with self._database.reading() as session:
            return any(self._may_take(row) for row in session.scalars(_claimable(None, keys)))

    def job(self, job: int) -> Job:
        """A job by number. Raises `JobError`."""
        with self._database.reading() as session:
            row = session.get(JobRow, job)
            if row is None:
                raise JobError(f"no job has number {job}", hint="`arrowmoe evolve status` lists them")
            return _record(Job, row)

    def jobs(self, *, keys: str | None = None, limit: int = 100) -> list[Job]:
        """Jobs, the latest first."""
        query = select(JobRow).order_by(JobRow.id.desc()).limit(limit)
        with self._database.reading() as session:
            rows = session.scalars(query if keys is None else query.where(JobRow.key.startswith(keys)))
            return [_record(Job, row) for row in rows]

    def held(self) -> list[Job]:
        """Jobs that a living process is working on."""
        with self._database.reading() as session:
            rows = session.scalars(select(JobRow).where(JobRow.state == RUNNING).order_by(JobRow.id))
            return [_record(Job, row) for row in rows if not self._may_take(row)]

    def advance(self, job: Job, stage: str, **found: Any) -> Job:
        """Enter that a stage begins, with what those before it found. Raises `JobError` if the lease was lost."""
        with self._held(job) as row:
            row.stage = stage
            row.outcome = {**row.outcome, **found}
            row.lease_until = self._now() + timedelta(seconds=LEASE_S)
            return _record(Job, row)

    def finish(self, job: Job, **found: Any) -> Job:
        """Enter that a job is done. Raises `JobError` if the lease was lost."""
        with self._held(job) as row:
            row.state, row.owner, row.lease_until = DONE, None, None
            row.outcome = {**row.outcome, **found}
            return _record(Job, row)

    def fail(self, job: Job, why: str, *, for_good: bool = False) -> Job:
        """Enter that an attempt failed: the job is tried again later, unless that was the last one."""
        with self._held(job) as row:
            over = for_good or row.attempts >= MAX_ATTEMPTS
            row.state, row.owner, row.lease_until = (FAILED if over else QUEUED), None, None
            row.not_before = self._now() + timedelta(seconds=RETRY_S * 2 ** (row.attempts - 1))
            row.outcome = {**row.outcome, "error": why}
            return _record(Job, row)

    def release(self, job: Job) -> None:
        """Give a job back as it is, for another night or process; the attempt does not count."""
        with self._held(job) as row:
            row.state, row.owner, row.lease_until = QUEUED, None, None
            row.attempts -= 1

    @contextmanager
    def renewing(self, job: Job) -> Iterator[None]:
        """Renew the lease in the background for as long as the block lasts."""
        over = threading.Event()

        def renew() -> None:
            while not over.wait(LEASE_S / 3):
                try:
                    with self._held(job) as row:
                        row.lease_until = self._now() + timedelta(seconds=LEASE_S)
                except JobError:
                    log.warning("lease_lost", job=job.id, key=job.key)
                    return

        thread = threading.Thread(target=renew, name="arrowmoe-lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    # Progress and notes

    def step(self, job: Job, phase: str, step: int, steps: int, loss_nats: float | None) -> None:
        """Enter a step of a training; one that a resumed training does again replaces the first."""
        with self._database.writing() as session:
            row = ProgressRow(job_id=job.id, phase=phase, step=step, steps=steps, loss_nats=loss_nats, at=self._now())
            session.merge(row)

    def steps(self, job: int) -> list[Step]:
        """The steps of a job's trainings, in order."""
        query = select(ProgressRow).where(ProgressRow.job_id == job).order_by(ProgressRow.at, ProgressRow.step)
        with self._database.reading() as session:
            return [_record(Step, row) for row in session.scalars(query)]

    def note(self, key: str) -> dict[str, Any] | None:
        """What was noted under `key`."""
        with self._database.reading() as session:
            row = session.get(NoteRow, key)
            return None if row is None else dict(row.value)

    def keep_note(self, key: str, value: Mapping[str, Any]) -> None:
        """Note `value` under `key`, instead of what stood there."""
        with self._database.writing() as session:
            session.merge(NoteRow(key=key, value=dict(value)))

    # How leases work

    def _may_take(self, row: JobRow) -> bool:
        now = self._now()
        if row.state == QUEUED:
            return row.not_before <= now
        return row.lease_until is None or row.lease_until <= now or _is_dead(row.owner)

    def _take(self, row: JobRow) -> bool:
        """Hold a job, or give it up for good if the process that tried it died each time."""
        now = self._now()
        row.updated = now
        if row.attempts >= MAX_ATTEMPTS:
            row.state, row.owner, row.lease_until = FAILED, None, None
            row.outcome = {**row.outcome, "error": f"its process died in each of {row.attempts} attempts"}
            return False
        row.state, row.owner, row.attempts = RUNNING, self.owner, row.attempts + 1
        row.lease_until = now + timedelta(seconds=LEASE_S)
        return True

    @contextmanager
    def _held(self, job: Job) -> Iterator[JobRow]:
        """The row of a job, if it is still ours."""
        with self._database.writing() as session:
            row = session.get(JobRow, job.id)
            if row is None or row.owner != self.owner:
                holder = "nobody" if row is None or row.owner is None else row.owner
                raise JobError(f"job {job.id} ({job.key}) was taken over: it is held by {holder}")
            row.updated = self._now()
            yield row
            session.flush()


def _claimable(base: str | None, keys: str | None) -> Select[JobRow]:
    query = select(JobRow).where(or_(JobRow.state == QUEUED, JobRow.state == RUNNING))
    if base is not None:
        query = query.where(JobRow.base == base)
    if keys is not None:
        query = query.where(JobRow.key.startswith(keys))
    return query.order_by(JobRow.priority.desc(), JobRow.id)


def _this_process() -> str:
    """Machine, process, when it started (a number may be given again), and which journal in it."""
    pid = os.getpid()
    return f"{socket.gethostname()[:24]}/{pid}/{_started(pid)}/{secrets.token_hex(2)}"


def _is_dead(owner: str | None) -> bool:
    """Whether the process that wrote this was on this machine and is no more."""
    host, _, rest = (owner or "").rpartition("/")[0].partition("/")
    pid, _, started = rest.partition("/")
    return host == socket.gethostname()[:24] and _started(int(pid)) != started


def _started(pid: int) -> str:
    """When a process started, in clock ticks since the machine did; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _record(kind: type[_Record], row: Any) -> _Record:
    return kind(**{one.name: getattr(row, one.name) for one in fields(kind)})


__all__ = ["DONE", "FAILED", "SCHEDULE", "GapRecord", "Job", "Journal", "NightRecord", "Step"]
