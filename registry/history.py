"""What the catalog remembers beyond its cards: numbered changes, tombstones, hidden cards, and the epochs seen.

Each function works in the caller's transaction, so that a change and its number are committed together. All writers of
a catalog run one after another (`registry.database`): a number is never seen before a smaller one.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from registry.card import LoRACard
from registry.changes import Change, Changes, Kind
from registry.digest import Digest
from registry.entries import CardEntry, HiddenCard
from registry.errors import AmbiguousCardError, RemovedCardError, UnknownCardError
from registry.identity import Signature
from registry.tables import CardRow, ChangeRow, EpochRow, HiddenRow, IndexRow, LabelRow, TombstoneRow
from registry.tombstones import Tombstone

_MIN_DIGITS = 8

# Changes ------------------------------------------------------------------------------------------------------------


def record(session: Session, digest: Digest, publisher: str | None, kind: Kind) -> None:
    """Give the change the next number; what was recorded of the card before is forgotten."""
    key, sequence = (digest, publisher or ""), _last(session) + 1
    row = session.get(ChangeRow, key)
    if row is None:
        session.add(ChangeRow(digest=key[0], publisher=key[1], sequence=sequence, kind=kind))
    else:
        row.sequence, row.kind = sequence, kind
    session.flush()


def page(session: Session, since: int, limit: int) -> Changes:
    """At most `limit` changes after number `since`."""
    same = (TombstoneRow.digest == ChangeRow.digest) & (TombstoneRow.publisher == ChangeRow.publisher)
    query = select(ChangeRow, TombstoneRow).outerjoin(TombstoneRow, same).where(ChangeRow.sequence > since)
    rows = session.execute(query.order_by(ChangeRow.sequence).limit(limit))
    return Changes(
        index_id=session.scalars(select(IndexRow.id)).one(),
        since=since,
        last=_last(session),
        entries=tuple(_change(row, tombstone) for row, tombstone in rows),
    )


def _last(session: Session) -> int:
    return session.scalar(select(func.max(ChangeRow.sequence))) or 0


def _change(row: ChangeRow, tombstone: TombstoneRow | None) -> Change:
    kind = Kind(row.kind)
    proof = _tombstone(tombstone) if kind is Kind.REMOVED and tombstone is not None else None
    return Change(sequence=row.sequence, digest=Digest(row.digest), kind=kind, tombstone=proof)


def _tombstone(row: TombstoneRow) -> Tombstone:
    return Tombstone.parse(row.body, Signature.parse(row.signature))


# Epochs -------------------------------------------------------------------------------------------------------------


def next_epoch(session: Session, publisher: str, name: str) -> int:
    """One more than the greatest epoch seen of the publisher and the name, in whatever version."""
    seen = select(func.max(EpochRow.epoch)).where(EpochRow.publisher == publisher, EpochRow.name == name)
    return (session.scalar(seen) or 0) + 1


def is_superseded(session: Session, publisher: str | None, name: str, version: str, epoch: int) -> bool:
    """Whether a greater epoch of the same publisher, name and version was seen, be that card here or removed."""
    row = session.get(EpochRow, (publisher, name, version)) if publisher else None
    return row is not None and epoch < row.epoch


def advance(session: Session, publisher: str, name: str, version: str, epoch: int) -> None:
    """Note an epoch that was seen; a greater one than before takes the label off the publisher's older cards."""
    row = session.get(EpochRow, (publisher, name, version))
    if row is None:
        session.add(EpochRow(publisher=publisher, name=name, version=version, epoch=epoch))
    elif epoch > row.epoch:
        row.epoch = epoch
    else:
        return
    older = select(CardRow.digest).where(
        CardRow.publisher == publisher, CardRow.name == name, CardRow.version == version, CardRow.epoch < epoch
    )
    stale = (LabelRow.name == name, LabelRow.version == version, LabelRow.digest.in_(older))
    session.execute(delete(LabelRow).where(*stale))
    session.flush()


# Removal ------------------------------------------------------------------------------------------------------------


def check_welcome(session: Session, card: LoRACard, *, by_hand: bool) -> None:
    """Raise `RemovedCardError` if the card's publisher removed it, or this node's owner did and it comes by itself."""
    label = f"{card.name}@{card.version}"
    publisher = card.manifest.publisher
    if publisher is not None and session.get(TombstoneRow, (card.digest, publisher)) is not None:
        raise RemovedCardError(
            f"{label} ({card.digest}) was removed by its publisher {publisher}, so it cannot come back",
            hint="publish the adapter anew: that makes another card",
        )
    if not by_hand and session.get(HiddenRow, card.digest) is not None:
        raise RemovedCardError(
            f"{label} ({card.digest}) was removed here, so it is not fetched again",
            hint=f"`arrowmoe skills unhide {card.digest}` lets it come back",
        )


def refused(session: Session, offered: Iterable[tuple[Digest, str | None]]) -> set[Digest]:
    """Those of the `offered` cards (digest, publisher) that were removed, here or by that publisher."""
    hidden = set(session.scalars(select(HiddenRow.digest)))
    removed = {(digest, publisher) for digest, publisher in session.execute(_TOMBSTONES)}
    return {digest for digest, publisher in offered if digest in hidden or (digest, publisher) in removed}


_TOMBSTONES = select(TombstoneRow.digest, TombstoneRow.publisher)


def bury(session: Session, tombstone: Tombstone) -> bool:
    """Enter a tombstone in the card's place; False if it was known. The card itself is the caller's to delete."""
    if session.get(TombstoneRow, (tombstone.digest, tombstone.publisher)) is not None:
        return False
    session.add(
        TombstoneRow(
            digest=tombstone.digest,
            publisher=tombstone.publisher,
            body=tombstone.body,
            signature=str(tombstone.signature),
        )
    )
    session.flush()
    advance(session, tombstone.publisher, tombstone.name, tombstone.version, tombstone.epoch)
    session.execute(
        delete(HiddenRow).where(HiddenRow.digest == tombstone.digest, HiddenRow.publisher == tombstone.publisher)
    )
    record(session, tombstone.digest, tombstone.publisher, Kind.REMOVED)
    return True


def hide(session: Session, entry: CardEntry) -> None:
    """Note that the owner does not want the card here."""
    session.add(
        HiddenRow(
            digest=entry.digest,
            name=entry.name,
            version=entry.version,
            publisher=entry.publisher,
            hidden_at=datetime.now(UTC),
        )
    )
    if entry.quarantined is None:
        record(session, entry.digest, entry.publisher, Kind.GONE)


def show(session: Session, digest: Digest) -> None:
    """Forget that the owner did not want the card."""
    session.execute(delete(HiddenRow).where(HiddenRow.digest == digest))


def hidden(session: Session) -> list[HiddenCard]:
    """The cards that the owner does not want, by name, version and digest."""
    cards = [
        HiddenCard(
            digest=Digest(row.digest),
            name=row.name,
            version=row.version,
            publisher=row.publisher,
            hidden_at=row.hidden_at,
        )
        for row in session.scalars(select(HiddenRow))
    ]
    return sorted(cards, key=lambda card: (card.name, card.version, card.digest))


def hidden_card(session: Session, ref: str) -> HiddenCard:
    """The hidden card that a name, name@version, digest or start of one means.

    Raises `UnknownCardError` or `AmbiguousCardError`.
    """
    cards = hidden(session)
    found = [card for card in cards if ref in (card.name, f"{card.name}@{card.version}")]
    found = found or [card for card in cards if begins(card.digest, ref)]
    if not found:
        names = ", ".join(f"{card.name}@{card.version}" for card in cards[:3])
        raise UnknownCardError(f"no hidden card is known as {ref[:200]!r}", hint=names and f"hidden are {names}")
    if len(found) > 1:
        digests = ", ".join(card.digest for card in found[:3])
        raise AmbiguousCardError(f"{ref} means several hidden cards: {digests}", hint="give the digest")
    return found[0]


def begins(digest: Digest, ref: str) -> bool:
    """Whether `ref` is 8 hex digits or more that the digest begins with, or all of it."""
    digits = ref.lower().removeprefix("blake3:")
    return len(digits) >= _MIN_DIGITS and digest.removeprefix("blake3:").startswith(digits)


__all__ = [
    "advance",
    "begins",
    "bury",
    "check_welcome",
    "hidden",
    "hidden_card",
    "hide",
    "is_superseded",
    "next_epoch",
    "page",
    "record",
    "refused",
    "show",
]
