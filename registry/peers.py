"""The peer book: which other nodes are known here, and what this node's owner thinks of them.

A node is pending until the owner approves it, or a node that the owner made an introducer does. What the owner decided
stands: an introduction never lifts a block, and what falls with its introducer falls back to pending. Introductions are
not passed on: the roster that others get lists only those whom the owner approved. All states are rows, so a decision
acts at once on every process of this node.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from hashlib import sha256

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from registry.database import Database
from registry.errors import InvitationError, UnknownPeerError
from registry.tables import InviteRow, PeerRow

_SECRET_BYTES = 16
_SEEN_EVERY = timedelta(minutes=1)
Clock = Callable[[], datetime]


class PeerState(StrEnum):
    """What the owner thinks of a node: nothing yet, that it may read the cards here, or that it may not even ask."""

    PENDING = "pending"
    APPROVED = "approved"
    BLOCKED = "blocked"


@dataclass(frozen=True, kw_only=True)
class KnownPeer:
    """A node in the book. `name` and `address` are hints: the id alone is proven."""

    node_id: str
    name: str = ""
    address: str | None = None
    state: PeerState = PeerState.PENDING
    introducer: bool = False
    introduced_by: str | None = None
    first_seen: datetime
    last_seen: datetime | None = None
    decided: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Introduced:
    """A node as an introducer names it."""

    node_id: str
    name: str = ""
    address: str | None = None


def utc_now() -> datetime:
    """The time in UTC."""
    return datetime.now(UTC)


class PeerBook:
    """The book of one node's database."""

    def __init__(self, database: Database, *, now: Clock = utc_now) -> None:
        self._database, self._now = database, now

    def peers(self) -> list[KnownPeer]:
        """All known nodes, by name."""
        with self._database.reading() as session:
            rows = session.scalars(select(PeerRow).order_by(PeerRow.name, PeerRow.node_id))
            return [_peer(row) for row in rows]

    def find(self, node_id: str) -> KnownPeer | None:
        """The node with this id; None if it was never met."""
        with self._database.reading() as session:
            row = session.get(PeerRow, node_id)
            return None if row is None else _peer(row)

    def roster(self) -> tuple[Introduced, ...]:
        """The nodes that the owner approved, as others may hear of them."""
        query = select(PeerRow).where(PeerRow.state == PeerState.APPROVED, PeerRow.introduced_by.is_(None))
        with self._database.reading() as session:
            rows = session.scalars(query.order_by(PeerRow.first_seen, PeerRow.node_id))
            return tuple(Introduced(node_id=row.node_id, name=row.name, address=row.address) for row in rows)

    def meet(self, node_id: str, *, most_pending: int) -> KnownPeer:
        """Enter a node as pending unless it is known; of more than `most_pending` the one that waited longest goes."""
        with self._database.writing() as session:
            row = session.get(PeerRow, node_id)
            if row is None:
                _make_room(session, most_pending - 1)
                row = _new(session, node_id, self._now())
            return _peer(row)

    def seen(self, node_id: str, *, name: str, address: str) -> None:
        """Note where a known node answered, and as whom; of an unknown one nothing is noted."""
        now = self._now()
        known = self.find(node_id)
        recently = known is not None and known.last_seen is not None and abs(now - known.last_seen) < _SEEN_EVERY
        if known is None or (recently and (known.name, known.address) == (name, address)):
            return
        with self._database.writing() as session:
            news = update(PeerRow).where(PeerRow.node_id == node_id)
            session.execute(news.values(name=name, address=address, last_seen=now))

    def approve(
        self, node_id: str, *, name: str = "", address: str | None = None, introducer: bool | None = None
    ) -> KnownPeer:
        """Let a node read the cards here; `introducer`: and those that it approved as well (None: as before)."""
        with self._database.writing() as session:
            row = _decided(session, node_id, PeerState.APPROVED, self._now())
            row.name, row.address = name or row.name, address or row.address
            row.introducer = row.introducer if introducer is None else introducer
            return _peer(row)

    def block(self, node_id: str) -> KnownPeer:
        """Answer a node no more; whom it introduced waits for approval again."""
        with self._database.writing() as session:
            row = _decided(session, node_id, PeerState.BLOCKED, self._now())
            row.introducer = False
            _forsake(session, node_id)
            return _peer(row)

    def remove(self, node_id: str) -> KnownPeer:
        """Forget a node; whom it introduced waits for approval again. Raises `UnknownPeerError`."""
        with self._database.writing() as session:
            row = session.get(PeerRow, node_id)
            if row is None:
                raise UnknownPeerError(f"no peer is known as {node_id}", hint="`arrowmoe peers ls` shows all")
            known = _peer(row)
            _forsake(session, node_id)
            session.delete(row)
            return known

    def introduced(self, introducer: str, others: Iterable[Introduced], *, own_id: str) -> tuple[str, ...]:
        """Approve whom an approved introducer names now, and no longer whom it once named; returns the newly approved.

        Nothing changes if it is no introducer any more.
        """
        named = {other.node_id: other for other in others if other.node_id not in (own_id, introducer)}
        with self._database.writing() as session:
            host = session.get(PeerRow, introducer)
            if host is None or not host.introducer or host.state != PeerState.APPROVED:
                return ()
            _drop(session, introducer=introducer, but=named)
            now = self._now()
            return tuple(other.node_id for other in named.values() if _introduce(session, introducer, other, now))


class Invitations:
    """Secrets that let one node each join; of a secret only its hash is kept."""

    def __init__(self, database: Database, *, now: Clock = utc_now) -> None:
        self._database, self._now = database, now

    def make(self, lasts: timedelta) -> tuple[str, datetime]:
        """A fresh secret, and when it expires by this node's clock."""
        secret, now = secrets.token_hex(_SECRET_BYTES), self._now()
        with self._database.writing() as session:
            session.execute(delete(InviteRow).where(InviteRow.expires < now))
            session.add(InviteRow(secret_hash=_hash(secret), created=now, expires=now + lasts))
        return secret, now + lasts

    def redeem(self, secret: str, guest: Introduced) -> KnownPeer:
        """Approve the node that shows the secret, once; the same node may show it again. Raises `InvitationError`."""
        now = self._now()
        with self._database.writing() as session:
            invite = session.get(InviteRow, _hash(secret))
            if invite is None or invite.expires < now:
                raise InvitationError("the join token is unknown here, or has expired", hint="ask for a new one")
            if invite.used_by not in (None, guest.node_id):
                raise InvitationError("the join token was used by another node", hint="ask for a new one")
            known = session.get(PeerRow, guest.node_id)
            if known is not None and known.state == PeerState.BLOCKED:
                raise InvitationError(f"node {guest.node_id} is blocked here, so no token lets it join")
            invite.used_by = guest.node_id
            row = _decided(session, guest.node_id, PeerState.APPROVED, now)
            row.name, row.address = guest.name, guest.address or row.address
            return _peer(row)


def _new(session: Session, node_id: str, now: datetime) -> PeerRow:
    row = PeerRow(node_id=node_id, name="", state=PeerState.PENDING, introducer=False, first_seen=now)
    session.add(row)
    session.flush()
    return row


def _decided(session: Session, node_id: str, state: PeerState, now: datetime) -> PeerRow:
    row = session.get(PeerRow, node_id) or _new(session, node_id, now)
    row.state, row.introduced_by, row.decided = state, None, now
    return row


def _introduce(session: Session, introducer: str, other: Introduced, now: datetime) -> bool:
    """Whether that made a waiting or unknown node an approved one."""
    row = session.get(PeerRow, other.node_id) or _new(session, other.node_id, now)
    row.name, row.address = row.name or other.name, row.address or other.address
    if row.state != PeerState.PENDING:
        return False
    row.state, row.introduced_by = PeerState.APPROVED, introducer
    return True


def _make_room(session: Session, places: int) -> None:
    """Forget the pending nodes that waited longest, until at most `places` are left."""
    pending = PeerRow.state == PeerState.PENDING
    count = session.scalar(select(func.count()).select_from(PeerRow).where(pending)) or 0
    if count > places:
        oldest = select(PeerRow.node_id).where(pending).order_by(PeerRow.first_seen, PeerRow.node_id)
        session.execute(delete(PeerRow).where(PeerRow.node_id.in_(session.scalars(oldest.limit(count - places)).all())))


def _forsake(session: Session, node_id: str) -> None:
    """Trust a node in nothing that it brought about before: whom it introduced, and the token by which it came."""
    _drop(session, introducer=node_id, but=())
    session.execute(delete(InviteRow).where(InviteRow.used_by == node_id))


def _drop(session: Session, *, introducer: str, but: Iterable[str]) -> None:
    """Whom `introducer` introduced waits for approval again, but for those."""
    rows = session.scalars(select(PeerRow).where(PeerRow.introduced_by == introducer))
    kept = set(but)
    for row in rows.all():
        if row.node_id not in kept:
            row.state, row.introduced_by = PeerState.PENDING, None


def _hash(secret: str) -> bytes:
    return sha256(secret.encode()).digest()


def _peer(row: PeerRow) -> KnownPeer:
    return KnownPeer(
        node_id=row.node_id,
        name=row.name,
        address=row.address,
        state=PeerState(row.state),
        introducer=row.introducer,
        introduced_by=row.introduced_by,
        first_seen=row.first_seen,
        last_seen=row.last_seen,
        decided=row.decided,
    )


__all__ = ["Introduced", "Invitations", "KnownPeer", "PeerBook", "PeerState", "utc_now"]
