"""Signals: what each request told of how well it was answered, kept in SQL as the owner allows.

Rules: what no card fitted (an abstention) and what the owner calls bad is always kept; of the rest a sample, each row
of which stands for `weight` requests. Over the cap the oldest that were answered go first, and never one that a gap
holds. What is older than the owner wants goes, whoever holds it. What a signal means: `evolution.dissonance`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta
from typing import Final, Literal, get_args
from uuid import uuid4

from sqlalchemy import and_, case, delete, func, select, update
from sqlalchemy.orm import Session

from evolution.clock import Now, utc_now
from evolution.errors import SignalError
from evolution.tables import SignalRow
from registry.database import Database
from registry.logs import get_logger

Feedback = Literal["good", "bad"]

_IDS_AT_ONCE: Final = 1000
"""Below every database's limit on the variables of one statement."""
_BAD: Final = and_(SignalRow.feedback.is_not(None), SignalRow.feedback == "bad")
_ORDINARY: Final = and_(SignalRow.accepted, ~_BAD)

_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Signal:
    """One request, as `SignalRow` keeps it; `sequence_nats` is −log P of its answer of `tokens` tokens.

    `created` is None until it is recorded. `p_value` is that of the best card, also where it was not accepted.
    """

    base: str
    prompt: str
    accepted: bool
    id: str = field(default_factory=lambda: uuid4().hex)
    created: datetime | None = None
    card: str | None = None
    answer: str | None = None
    p_value: float | None = None
    sequence_nats: float | None = None
    tokens: int | None = None
    feedback: str | None = None
    correction: str | None = None
    agreement: float | None = None
    weight: float = 1.0
    gap_id: int | None = None

    @property
    def ordinary(self) -> bool:
        """Whether a card answered it, and nobody complained."""
        return self.accepted and self.feedback != "bad"


@dataclass(frozen=True, kw_only=True)
class SignalPolicy:
    """What the owner lets the node remember of its requests."""

    enabled: bool = True
    sample_rate: float = 1.0
    max_rows: int = 20_000
    retention_days: float = 30.0


@dataclass(frozen=True, kw_only=True)
class SignalCounts:
    """Rows of one base model; `queued` are those that no gap holds."""

    total: int
    abstained: int
    good: int
    bad: int
    queued: int


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """Rows that were removed for their age, and for the cap."""

    expired: int
    over_cap: int


class SignalStore:
    """The signals of one database. Each method is one transaction; threads and processes may share the rows."""

    def __init__(
        self,
        database: Database,
        *,
        policy: SignalPolicy,
        now: Now = utc_now,
        rng: random.Random | None = None,
    ) -> None:
        self._database = database
        self._policy = policy
        self._now = now
        self._rng = rng or random.Random()

    def record(self, signal: Signal) -> str | None:
        """Keep a request; its id, or None where policy or sampling dropped it. One that is there is overwritten."""
        return self.record_all([signal])[0]

    def record_all(self, signals: Sequence[Signal]) -> list[str | None]:
        """Keep the requests of one batch, as `record` does."""
        kept = {signal.id: self._stamped(signal) for signal in signals if self._policy.enabled and self._wanted(signal)}
        if kept:
            with self._database.writing() as session:
                for signal in kept.values():
                    session.merge(SignalRow(**asdict(signal)))
                removed = _shrink(session, self._policy.max_rows)
            _log.debug("signals_recorded", kept=len(kept), of=len(signals), removed_over_cap=len(removed))
            kept = {id_: signal for id_, signal in kept.items() if id_ not in removed}
        return [signal.id if signal.id in kept else None for signal in signals]

    def feedback(self, signal_id: str, verdict: Feedback, *, correction: str | None = None) -> None:
        """Note what the owner says of an answer, and what it should have been. Raises `SignalError`."""
        if verdict not in get_args(Feedback):
            raise SignalError(f"expected feedback good or bad, got {verdict!r}", hint="say good or bad")
        with self._database.writing() as session:
            row = session.get(SignalRow, signal_id)
            if row is None:
                raise SignalError(
                    f"expected the id of a recorded request, got {signal_id[:40]!r}, so nothing was noted",
                    hint="sampling, the cap or retention may have dropped it; `evolve signals` lists those there are",
                )
            row.feedback = verdict
            row.correction = correction

    def queued(self, base: str) -> list[Signal]:
        """Signals of `base` that no gap holds, the oldest first."""
        query = select(SignalRow).where(SignalRow.base == base, SignalRow.gap_id.is_(None))
        with self._database.reading() as session:
            return _signals(session.scalars(query.order_by(SignalRow.created, SignalRow.id)))

    def of_gap(self, gap_id: int) -> list[Signal]:
        """Signals that a gap holds, the oldest first."""
        query = select(SignalRow).where(SignalRow.gap_id == gap_id)
        with self._database.reading() as session:
            return _signals(session.scalars(query.order_by(SignalRow.created, SignalRow.id)))

    def recent(self, limit: int = 20, *, base: str | None = None) -> list[Signal]:
        """The newest signals, of all bases or of one."""
        query = select(SignalRow) if base is None else select(SignalRow).where(SignalRow.base == base)
        with self._database.reading() as session:
            return _signals(session.scalars(query.order_by(SignalRow.created.desc(), SignalRow.id).limit(limit)))

    def counts(self) -> dict[str, SignalCounts]:
        """How many rows there are, by base."""
        columns = (~SignalRow.accepted, SignalRow.feedback == "good", _BAD, SignalRow.gap_id.is_(None))
        sums = (func.sum(case((column, 1), else_=0)) for column in columns)
        query = select(SignalRow.base, func.count(), *sums).group_by(SignalRow.base).order_by(SignalRow.base)
        with self._database.reading() as session:
            return {
                base: SignalCounts(total=total, abstained=abstained, good=good, bad=bad, queued=queued)
                for base, total, abstained, good, bad, queued in session.execute(query)
            }

    def agreed(self, agreements: Mapping[str, float]) -> None:
        """Note how well samples of each answer agreed, by the signal's id; one that is gone is passed over."""
        with self._database.writing() as session:
            for signal_id, value in agreements.items():
                session.execute(update(SignalRow).where(SignalRow.id == signal_id).values(agreement=value))

    def assign(self, gap_id: int, ids: Sequence[str]) -> int:
        """Give queued signals to a gap; how many it got (another gap's stay there, and pruned ones are gone)."""
        with self._database.writing() as session:
            free = [
                row
                for part in _parts(ids)
                for row in session.scalars(select(SignalRow).where(SignalRow.id.in_(part), SignalRow.gap_id.is_(None)))
            ]
            for row in free:
                row.gap_id = gap_id
            return len(free)

    def release(self, gap_id: int) -> int:
        """Queue a gap's signals again; how many."""
        with self._database.writing() as session:
            rows = session.scalars(select(SignalRow).where(SignalRow.gap_id == gap_id)).all()
            for row in rows:
                row.gap_id = None
            return len(rows)

    def prune(self) -> Pruned:
        """Remove what is older than the policy's retention, and what is over its cap."""
        oldest = self._now() - timedelta(days=self._policy.retention_days)
        with self._database.writing() as session:
            expired = session.scalars(select(SignalRow.id).where(SignalRow.created < oldest)).all()
            _delete(session, expired)
            pruned = Pruned(expired=len(expired), over_cap=len(_shrink(session, self._policy.max_rows)))
        _log.info("signals_pruned", **asdict(pruned), oldest=oldest.isoformat())
        return pruned

    def forget(self) -> int:
        """Remove every signal, whoever holds it; how many there were."""
        with self._database.writing() as session:
            total = _total(session)
            session.execute(delete(SignalRow))
        _log.info("signals_forgotten", count=total)
        return total

    def _wanted(self, signal: Signal) -> bool:
        return not signal.ordinary or self._rng.random() < self._policy.sample_rate

    def _stamped(self, signal: Signal) -> Signal:
        weight = 1 / self._policy.sample_rate if signal.ordinary else 1.0
        return replace(signal, created=signal.created or self._now(), weight=signal.weight * weight)


def _signals(rows: Iterable[SignalRow]) -> list[Signal]:
    names = [column.name for column in fields(Signal)]
    return [Signal(**{name: getattr(row, name) for name in names}) for row in rows]


def _total(session: Session) -> int:
    return session.scalar(select(func.count()).select_from(SignalRow)) or 0


def _shrink(session: Session, most: int) -> set[str]:
    """Remove rows until `most` are left, the least needed first; the ids of those removed."""
    excess = _total(session) - most
    if excess <= 0:
        return set()
    least_needed = (case((_ORDINARY, 0), else_=1), SignalRow.created, SignalRow.id)
    query = select(SignalRow.id).where(SignalRow.gap_id.is_(None)).order_by(*least_needed).limit(excess)
    ids = session.scalars(query).all()
    _delete(session, ids)
    return set(ids)


def _delete(session: Session, ids: Sequence[str]) -> None:
    for part in _parts(ids):
        session.execute(delete(SignalRow).where(SignalRow.id.in_(part)))


def _parts(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (ids[start : start + _IDS_AT_ONCE] for start in range(0, len(ids), _IDS_AT_ONCE))


__all__ = ["Feedback", "Pruned", "Signal", "SignalCounts", "SignalPolicy", "SignalStore"]
