"""What the catalog remembers beyond its cards: numbered changes, tombstones, hidden cards, and the epochs seen.

Each function works in the caller's transaction, so that a change and its number are committed together. All writers of
a catalog run one after another (`registry.database`): a number is never seen before a smaller one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import delete, exists, func, insert, select, tuple_
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
_AS_IT_IS = {"synchronize_session": False}  # no row of these tables is in the session's hands

# Changes ------------------------------------------------------------------------------------------------------------


def record(session: Session, cards: Collection[tuple[Digest, str | None]], kind: Kind) -> None:
    """Give the change of each card (digest, publisher) the next number; what was recorded of it before is forgotten."""
    keys = [(digest, publisher or "") for digest, publisher in cards]
    same = tuple_(ChangeRow.digest, ChangeRow.publisher).in_(keys)
    first = _last(session) + 1
    session.execute(delete(ChangeRow).where(same), execution_options=_AS_IT_IS)
    rows = [
        {"digest": digest, "publisher": publisher, "sequence": sequence, "kind": kind}
        for sequence, (digest, publisher) in enumerate(keys, first)
    ]
    session.execute(insert(ChangeRow), rows)


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


@dataclass(frozen=True, kw_only=True)
class Edition:
    """One card among those that its publisher gave one name and version."""

    digest: Digest
    publisher: str | None
    name: str
    version: str
    epoch: int

    @property
    def key(self) -> tuple[str, str, str] | None:
        """What the editions share; None if nobody signed this one."""
        return None if self.publisher is None else (self.publisher, self.name, self.version)


def advance(session: Session, editions: Iterable[Edition]) -> dict[tuple[str, str, str], int]:
    """Note epochs that were seen; a greater one than before takes the label off the publisher's older cards.

    Returns the greatest that is known now, by `Edition.key`.
    """
    seen = [(edition.key, edition.epoch) for edition in editions if edition.key is not None]
    before = _epochs(session, {key for key, _ in seen})
    newest = dict(before)
    for key, epoch in seen:
        newest[key] = max(epoch, newest.get(key, epoch))
    risen = {key: epoch for key, epoch in newest.items() if epoch != before.get(key)}
    if risen:
        _write_epochs(session, risen)
    if risen.keys() & before.keys():
        _take_labels_off_older(session, risen.keys() & before.keys())
    return newest


_EPOCH_KEY = tuple_(EpochRow.publisher, EpochRow.name, EpochRow.version)


def _epochs(session: Session, keys: Collection[tuple[str, str, str]]) -> dict[tuple[str, str, str], int]:
    columns = (EpochRow.publisher, EpochRow.name, EpochRow.version, EpochRow.epoch)
    rows = session.execute(select(*columns).where(_EPOCH_KEY.in_(keys)))
    return {(publisher, name, version): epoch for publisher, name, version, epoch in rows}


def _write_epochs(session: Session, epochs: Mapping[tuple[str, str, str], int]) -> None:
    session.execute(delete(EpochRow).where(_EPOCH_KEY.in_(epochs.keys())), execution_options=_AS_IT_IS)
    rows = [
        {"publisher": publisher, "name": name, "version": version, "epoch": epoch}
        for (publisher, name, version), epoch in epochs.items()
    ]
    session.execute(insert(EpochRow), rows)


def _take_labels_off_older(session: Session, keys: Collection[tuple[str, str, str]]) -> None:
    older = exists().where(
        CardRow.digest == LabelRow.digest,
        CardRow.name == LabelRow.name,
        CardRow.version == LabelRow.version,
        EpochRow.publisher == CardRow.publisher,
        EpochRow.name == CardRow.name,
        EpochRow.version == CardRow.version,
        _EPOCH_KEY.in_(keys),
        CardRow.epoch < EpochRow.epoch,
    )
    labels = tuple_(LabelRow.name, LabelRow.version).in_({(name, version) for _, name, version in keys})
    session.execute(delete(LabelRow).where(labels, older), execution_options=_AS_IT_IS)


# Removal ------------------------------------------------------------------------------------------------------------


def unwelcome(session: Session, cards: Sequence[LoRACard], *, by_hand: bool) -> dict[Digest, RemovedCardError]:
    """Why some of the cards may not come.

    Their publisher removed them; or this node's owner did, and they come by themselves.
    """
    digests = [card.digest for card in cards]
    removed = {(digest, who) for digest, who in session.execute(_TOMBSTONES.where(TombstoneRow.digest.in_(digests)))}
    here = select(HiddenRow.digest).where(HiddenRow.digest.in_(digests))
    hidden = set() if by_hand else set(session.scalars(here))
    errors = {card.digest: _hidden_here(card) for card in cards if card.digest in hidden}
    return errors | {
        card.digest: _removed_for_good(card) for card in cards if (card.digest, card.manifest.publisher) in removed
    }


def _removed_for_good(card: LoRACard) -> RemovedCardError:
    return RemovedCardError(
        f"{card.name}@{card.version} ({card.digest}) was removed by its publisher {card.manifest.publisher}, so it "
        "cannot come back",
        hint="publish the adapter anew: that makes another card",
    )


def _hidden_here(card: LoRACard) -> RemovedCardError:
    return RemovedCardError(
        f"{card.name}@{card.version} ({card.digest}) was removed here, so it is not fetched again",
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
    advance(session, [_edition_of(tombstone)])
    session.execute(
        delete(HiddenRow).where(HiddenRow.digest == tombstone.digest, HiddenRow.publisher == tombstone.publisher)
    )
    record(session, [(tombstone.digest, tombstone.publisher)], Kind.REMOVED)
    return True


def _edition_of(tombstone: Tombstone) -> Edition:
    return Edition(
        digest=tombstone.digest,
        publisher=tombstone.publisher,
        name=tombstone.name,
        version=tombstone.version,
        epoch=tombstone.epoch,
    )


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
        record(session, [(entry.digest, entry.publisher)], Kind.GONE)


def show(session: Session, digests: Collection[Digest]) -> None:
    """Forget that the owner did not want the cards."""
    session.execute(delete(HiddenRow).where(HiddenRow.digest.in_(digests)))


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
    "Edition",
    "advance",
    "begins",
    "bury",
    "hidden",
    "hidden_card",
    "hide",
    "is_superseded",
    "next_epoch",
    "page",
    "record",
    "refused",
    "show",
    "unwelcome",
]
