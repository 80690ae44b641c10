"""What a teacher may cost: money and tokens are reserved before a call and settled after it.

Rule: spent + reserved never exceeds the limit, however many threads and processes share an account, as long as a call
costs no more than was reserved for it. A reservation that nobody settles (its process died) counts as spent in full.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from math import ceil
from typing import Final
from uuid import uuid4

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from evolution.clock import Now, utc_now
from evolution.errors import BudgetSpentError
from evolution.tables import BudgetRow, ReservationRow
from registry.database import Database
from registry.logs import get_logger

LEASE_S: Final = 3600.0

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Money in millionths of a dollar, and tokens read and written together."""

    microusd: int = 0
    tokens: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(microusd=self.microusd + other.microusd, tokens=self.tokens + other.tokens)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(microusd=self.microusd - other.microusd, tokens=self.tokens - other.tokens)

    def within(self, limit: Cost) -> bool:
        """Whether neither money nor tokens exceed `limit`."""
        return self.microusd <= limit.microusd and self.tokens <= limit.tokens

    def __str__(self) -> str:
        return f"{self.microusd} µ$ and {self.tokens} tokens"


@dataclass(frozen=True, kw_only=True)
class Price:
    """Dollars per million tokens, which is millionths of a dollar per token."""

    prompt_usd_per_million: float = 0.0
    completion_usd_per_million: float = 0.0

    def cost(self, prompt_tokens: int, completion_tokens: int) -> Cost:
        """What a call costs, rounded up."""
        microusd = prompt_tokens * self.prompt_usd_per_million + completion_tokens * self.completion_usd_per_million
        return Cost(microusd=ceil(microusd), tokens=prompt_tokens + completion_tokens)


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """Money and tokens that one call may use up."""

    id: str
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class Standing:
    """An account: its limit, what was spent and what is promised to calls under way."""

    limit: Cost
    spent: Cost
    reserved: Cost

    @property
    def left(self) -> Cost:
        """What may still be reserved."""
        return self.limit - self.spent - self.reserved


class Budget:
    """One account. Whoever opens it states its limits, which hold for all; safe among threads and processes."""

    def __init__(
        self,
        database: Database,
        account: str,
        *,
        limit_microusd: int,
        limit_tokens: int,
        now: Now = utc_now,
    ) -> None:
        self.database, self.account, self._now = database, account, now
        with database.writing() as session:
            row = session.get(BudgetRow, account)
            if row is None:
                row = BudgetRow(account=account, spent_microusd=0, spent_tokens=0)
                session.add(row)
            row.limit_microusd, row.limit_tokens = limit_microusd, limit_tokens

    def reserve(self, microusd: int, tokens: int) -> Reservation:
        """Set aside what a call may cost at most. Raises `BudgetSpentError` if that is more than is left."""
        cost = Cost(microusd=microusd, tokens=tokens)
        if min(microusd, tokens) < 0:
            raise ValueError(f"expected amounts of at least 0, got {cost}")
        reservation = Reservation(id=uuid4().hex, cost=cost)
        with self.database.writing() as session:
            self._forfeit(session)
            standing = _standing(session, _row(session, self.account))
            if not cost.within(standing.left):
                raise BudgetSpentError(
                    f"expected at most {standing.left} left for {self.account!r}, got a call for up to {cost}: of "
                    f"{standing.limit}, {standing.spent} are spent and {standing.reserved} promised to other calls",
                    hint="raise the budget, or wait for the next night",
                )
            expires = self._now() + timedelta(seconds=LEASE_S)
            session.add(
                ReservationRow(
                    id=reservation.id, account=self.account, microusd=microusd, tokens=tokens, expires=expires
                )
            )
        return reservation

    def settle(self, reservation: Reservation, microusd: int, tokens: int) -> None:
        """Say what the call did cost, once; one settled after its reservation expired stays spent in full."""
        cost = Cost(microusd=microusd, tokens=tokens)
        with self.database.writing() as session:
            row = session.get(ReservationRow, reservation.id)
            if row is not None:
                session.delete(row)
                _spend(_row(session, self.account), cost)
        if row is None:
            log.warning("reservation_expired", account=self.account, reserved=str(reservation.cost), cost=str(cost))
        elif not cost.within(reservation.cost):
            log.warning("reservation_exceeded", account=self.account, reserved=str(reservation.cost), cost=str(cost))

    def standing(self) -> Standing:
        """Limit, spent and reserved, of one moment."""
        with self.database.reading() as session:
            return _standing(session, _row(session, self.account))

    def left(self) -> Cost:
        """What may still be reserved."""
        return self.standing().left

    def _forfeit(self, session: Session) -> None:
        """Count reservations that expired as spent in full."""
        ours = ReservationRow.account == self.account
        for row in session.scalars(select(ReservationRow).where(ours, ReservationRow.expires <= self._now())):
            cost = Cost(microusd=row.microusd, tokens=row.tokens)
            log.warning("reservation_forfeited", account=self.account, cost=str(cost))
            _spend(_row(session, self.account), cost)
            session.delete(row)
        session.flush()


def standing_of(database: Database, account: str) -> Standing | None:
    """How an account stands, for whoever only looks; None if nobody has opened it."""
    with database.reading() as session:
        row = session.get(BudgetRow, account)
        return None if row is None else _standing(session, row)


def _row(session: Session, account: str) -> BudgetRow:
    return session.get_one(BudgetRow, account)


def _standing(session: Session, row: BudgetRow) -> Standing:
    sums = func.coalesce(func.sum(ReservationRow.microusd), 0), func.coalesce(func.sum(ReservationRow.tokens), 0)
    microusd, tokens = session.execute(select(*sums).where(ReservationRow.account == row.account)).one()
    return Standing(
        limit=Cost(microusd=row.limit_microusd, tokens=row.limit_tokens),
        spent=Cost(microusd=row.spent_microusd, tokens=row.spent_tokens),
        reserved=Cost(microusd=int(microusd), tokens=int(tokens)),
    )


def _spend(row: BudgetRow, cost: Cost) -> None:
    row.spent_microusd += cost.microusd
    row.spent_tokens += cost.tokens


__all__ = ["Budget", "Cost", "Price", "Reservation", "Standing", "standing_of"]
