"""Cards in quarantine: here with their bytes, and neither used nor passed on until this node's owner admits them.

Such a card has no label, takes none from another, moves no epoch and is no change: to names, routers and peers it is
as if it were not here. Each function works in the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, datetime

from sqlalchemy import ColumnElement, delete, insert, select
from sqlalchemy.orm import Session

from registry.digest import Digest
from registry.errors import AmbiguousCardError
from registry.history import begins
from registry.tables import CardRow, QuarantineRow


def put(session: Session, reasons: Mapping[Digest, str]) -> None:
    """Note of cards, whose rows are there, why they are not to be used."""
    now = datetime.now(UTC)
    rows = [{"digest": digest, "reason": reason, "since": now} for digest, reason in reasons.items()]
    if rows:
        session.execute(insert(QuarantineRow), rows)


def lift(session: Session, digests: Collection[Digest]) -> None:
    """Forget the notes, if there are any."""
    session.execute(delete(QuarantineRow).where(QuarantineRow.digest.in_(digests)))


def holds(session: Session, digest: Digest) -> bool:
    """Whether the card is in quarantine."""
    return session.get(QuarantineRow, digest) is not None


def digests(session: Session) -> set[Digest]:
    """All cards in quarantine."""
    return set(map(Digest, session.scalars(select(QuarantineRow.digest))))


def is_admitted() -> ColumnElement[bool]:
    """The condition that a card is not in quarantine."""
    return CardRow.digest.not_in(select(QuarantineRow.digest))


def meant(session: Session, ref: str) -> Digest | None:
    """The card in quarantine that a name, name@version, digest or start of one means. Raises `AmbiguousCardError`."""
    query = select(CardRow.digest, CardRow.name, CardRow.version)
    cards = session.execute(query.join(QuarantineRow, QuarantineRow.digest == CardRow.digest)).all()
    found = sorted(digest for digest, name, version in cards if ref in (name, f"{name}@{version}"))
    found = found or sorted(digest for digest, _, _ in cards if begins(Digest(digest), ref))
    if len(found) > 1:
        raise AmbiguousCardError(
            f"{ref} means several cards in quarantine: {', '.join(found[:3])}", hint="give the digest"
        )
    return Digest(found[0]) if found else None


__all__ = ["digests", "holds", "is_admitted", "lift", "meant", "put"]
