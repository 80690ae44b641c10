"""The catalog: which cards there are, what they go by and where they came from. Rows only, never a file.

Everything a `CardEntry` shows stands in columns, so that listing ten thousand cards opens none. What a name means is
decided in `registry.labels`. A card in quarantine (`registry.quarantine`) is listed to who asks for it, and to nobody
else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from sqlalchemy import ColumnElement, Select, case, delete, func, or_, select
from sqlalchemy.orm import Session

from registry import arrivals, history, listing, quarantine
from registry.arrivals import Arrival
from registry.card import LoRACard
from registry.changes import Changes
from registry.database import Database
from registry.digest import Digest, is_digest
from registry.entries import CardEntry, HiddenCard, Holding, Origin
from registry.errors import (
    AmbiguousCardError,
    CardIntegrityError,
    LabelTakenError,
    QuarantinedCardError,
    RemovedCardError,
    UnknownCardError,
)
from registry.history import Edition
from registry.labels import newest, next_version, version_key
from registry.tables import CardRow, LabelRow, OriginRow, TagRow
from registry.tombstones import Tombstone

_DIGEST_PREFIX = re.compile(r"(?:blake3:)?([0-9a-f]{8,64})", re.IGNORECASE)
_MAX_WORDS = 32
_PAGE = 1000

Entries = list[CardEntry]  # within the class `list` is its method
HiddenCards = list[HiddenCard]


class Catalog:
    """The rows of one database. Each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self,
        card: LoRACard,
        *,
        tags: Iterable[str] = (),
        origin: Origin | None = None,
        exclusive: bool = False,
        newest: bool = False,
        quarantine_for: str | None = None,
    ) -> CardEntry:
        """Enter a card with the label of its manifest; of a card that is known, only new tags are added.

        A card without `origin` comes by the owner's hand, so it may have been hidden, or in quarantine. Raises
        `RemovedCardError`, and `LabelTakenError` where the label is to be `exclusive` and means another card, or the
        card is to be the `newest` of its publisher and name and another was published meanwhile. With
        `quarantine_for`, a reason, a new card goes into quarantine.
        """
        by_hand = origin is None
        with self._database.writing() as session:
            if _is_new(session, card.digest, by_hand=by_hand):
                _check(session, card, by_hand=by_hand, exclusive=exclusive, newest=newest)
                arrivals.enter(session, [Arrival(card=card, origin=origin, quarantine_for=quarantine_for)])
            _add_tags(session, card.digest, tags)
            return _entry(session, card.digest)

    def add_all(self, coming: Sequence[Arrival]) -> dict[Digest, CardEntry | RemovedCardError]:
        """Enter peers' cards in one transaction: their entries, or why a card may not come; one may be known."""
        cards = {arrival.card.digest: arrival for arrival in coming}
        with self._database.writing() as session:
            known = set(session.scalars(select(CardRow.digest).where(CardRow.digest.in_(cards))))
            new = [arrival for digest, arrival in cards.items() if digest not in known]
            refused = history.unwelcome(session, [arrival.card for arrival in new], by_hand=False)
            arrivals.enter(session, [arrival for arrival in new if arrival.card.digest not in refused])
            entries = listing.entries(session, select(CardRow.digest).where(CardRow.digest.in_(cards)))
            return {**refused, **{entry.digest: entry for entry in entries}}

    def admit(self, ref: str) -> CardEntry:
        """Let the card behind `ref` out of quarantine; one that is not there stays as it is."""
        with self._database.writing() as session:
            digest = _resolve(session, ref, quarantined=True)
            row = session.get(CardRow, digest)
            if row is not None and quarantine.holds(session, digest):
                quarantine.lift(session, [digest])
                arrivals.activate(session, [_edition_of(row)])
            return _entry(session, digest)

    def check(self, card: LoRACard, *, by_hand: bool, exclusive: bool, newest: bool) -> None:
        """Raise what `add` would raise."""
        with self._database.reading() as session:
            if _is_new(session, card.digest, by_hand=by_hand):
                _check(session, card, by_hand=by_hand, exclusive=exclusive, newest=newest)

    def holds(self, digest: Digest) -> bool:
        """Whether the card is in the catalog, be it in quarantine or not."""
        with self._database.reading() as session:
            return session.scalar(select(CardRow.digest).where(CardRow.digest == digest)) is not None

    def is_admitted(self, digest: Digest) -> bool:
        """Whether the card is in the catalog and not in quarantine."""
        with self._database.reading() as session:
            which = select(CardRow.digest).where(CardRow.digest == digest, quarantine.is_admitted())
            return session.scalar(which) is not None

    def digests(self, *, quarantined: bool = False) -> set[Digest]:
        """All cards in the catalog; with `quarantined`, those in quarantine too."""
        with self._database.reading() as session:
            return set(map(Digest, session.scalars(_all(quarantined=quarantined))))

    def resolve(self, ref: str, *, quarantined: bool = False) -> Digest:
        """The digest that a name, name@version, digest or prefix of one means.

        Raises `UnknownCardError` or `AmbiguousCardError`; unless `quarantined`, `QuarantinedCardError` for a card in
        quarantine.
        """
        with self._database.reading() as session:
            return _resolve(session, ref, quarantined=quarantined)

    def entry(self, ref: str, *, quarantined: bool = False) -> CardEntry:
        """The card behind `ref`. Raises as `resolve` does."""
        with self._database.reading() as session:
            return _entry(session, _resolve(session, ref, quarantined=quarantined))

    def labelled(self, name: str, version: str) -> CardEntry | None:
        """The card that `name@version` means, if there is one."""
        which = select(LabelRow).where(LabelRow.name == name, LabelRow.version == version)
        with self._database.reading() as session:
            best = newest(listing.labels(session, which))
            return None if best is None else _entry(session, best.digest)

    def held_from(self, peer_id: str) -> Holding:
        """How much came from the peer and is still here."""
        count = select(func.count(), func.coalesce(func.sum(CardRow.nbytes), 0)).select_from(CardRow)
        query = count.join(OriginRow, OriginRow.digest == CardRow.digest).where(OriginRow.peer_id == peer_id)
        with self._database.reading() as session:
            cards, nbytes = session.execute(query).one()
            return Holding(cards=cards, nbytes=int(nbytes))

    def list(self, *conditions: ColumnElement[bool], quarantined: bool = False) -> Entries:
        """Entries that meet all `conditions` (see `listing`), by name, the newest version first."""
        with self._database.reading() as session:
            return listing.in_order(listing.entries(session, _all(quarantined=quarantined).where(*conditions)))

    def search(self, text: str) -> Entries:
        """Entries that hold words of `text` in name, description, domains, examples or tags; most words first."""
        words = [*dict.fromkeys(text.casefold().split())][:_MAX_WORDS]
        if not words:
            return []
        matches = [listing.holds_word(word) for word in words]
        score = sum((case((match, 1), else_=0) for match in matches[1:]), case((matches[0], 1), else_=0))
        with self._database.reading() as session:
            rows = session.execute(select(CardRow.digest, score).where(or_(*matches))).all()
            scores: dict[str, int] = dict(map(tuple, rows))
            found = listing.in_order(listing.entries(session, _all().where(or_(*matches))))
        return sorted(found, key=lambda entry: -scores.get(entry.digest, 0))

    def next_version(self, name: str) -> str:
        """A version of `name` that is free and above all others."""
        with self._database.reading() as session:
            return _next_version(session, name)

    def label(self, ref: str, name: str, version: str) -> None:
        """Make `name@version` mean the card behind `ref`, and no other."""
        with self._database.writing() as session:
            digest = _resolve(session, ref)
            session.execute(delete(LabelRow).where(LabelRow.name == name, LabelRow.version == version))
            session.add(LabelRow(name=name, version=version, digest=digest))

    def tag(self, ref: str, tags: Iterable[str]) -> None:
        """Add tags to the card behind `ref`."""
        with self._database.writing() as session:
            _add_tags(session, _resolve(session, ref), tags)

    def untag(self, ref: str, tags: Iterable[str]) -> None:
        """Take tags off the card behind `ref`; one that it does not have is no error."""
        with self._database.writing() as session:
            digest = _resolve(session, ref)
            session.execute(delete(TagRow).where(TagRow.digest == digest, TagRow.tag.in_(tuple(tags))))

    def remove(self, digest: Digest) -> CardEntry:
        """Take a card out, with its labels, tags and origin, and hide it. Raises `UnknownCardError`."""
        with self._database.writing() as session:
            entry = _entry(session, digest)
            session.execute(delete(CardRow).where(CardRow.digest == digest))
            history.hide(session, entry)
            return entry

    def bury(self, tombstone: Tombstone) -> bool:
        """Put a verified tombstone in its card's place, be the card here or not; False if it was known.

        Raises `CardIntegrityError` if the card is here and is not what the tombstone says.
        """
        with self._database.writing() as session:
            row = session.get(CardRow, tombstone.digest)
            if row is not None:
                _check_same(row, tombstone)
                session.delete(row)
                session.flush()
            return history.bury(session, tombstone)

    def entries(self, digests: Iterable[Digest]) -> Entries:
        """Those of the cards that are here and not in quarantine, in no stated order."""
        which = select(CardRow.digest).where(CardRow.digest.in_(tuple(digests)), quarantine.is_admitted())
        with self._database.reading() as session:
            return listing.entries(session, which)

    def changes(self, since: int = 0, limit: int = _PAGE) -> Changes:
        """At most `limit` changes after number `since`, in order; the latest of each card. Raises `ValueError`."""
        if since < 0 or limit < 1:
            raise ValueError(f"expected since >= 0 and limit >= 1, got {since} and {limit}")
        with self._database.reading() as session:
            return history.page(session, since, limit)

    def refused(self, offered: Iterable[tuple[Digest, str | None]]) -> set[Digest]:
        """Those of the `offered` cards (digest, publisher) that need not come.

        They were removed, here or by that publisher, or lie in quarantine.
        """
        offered = tuple(offered)
        with self._database.reading() as session:
            held = quarantine.digests(session)
            return history.refused(session, offered) | {digest for digest, _ in offered if digest in held}

    def hidden(self) -> HiddenCards:
        """Cards that the owner removed here, though others may go on."""
        with self._database.reading() as session:
            return history.hidden(session)

    def unhide(self, ref: str) -> HiddenCard:
        """Let a hidden card come back. Raises `UnknownCardError` or `AmbiguousCardError`."""
        with self._database.writing() as session:
            card = history.hidden_card(session, ref)
            history.show(session, [card.digest])
            return card

    def next_epoch(self, publisher: str, name: str) -> int:
        """One more than the greatest epoch seen of the publisher and the name."""
        with self._database.reading() as session:
            return history.next_epoch(session, publisher, name)


def _all(*, quarantined: bool = False) -> Select[str]:
    """The digests of all cards, or of all that are not in quarantine."""
    query = select(CardRow.digest)
    return query if quarantined else query.where(quarantine.is_admitted())


def _is_new(session: Session, digest: Digest, *, by_hand: bool) -> bool:
    """Whether the card is not here yet, or is in quarantine, from which only the owner takes it."""
    return session.get(CardRow, digest) is None or (by_hand and quarantine.holds(session, digest))


def _edition_of(row: CardRow) -> Edition:
    return Edition(
        digest=Digest(row.digest), publisher=row.publisher, name=row.name, version=row.version, epoch=row.epoch
    )


def _check(session: Session, card: LoRACard, *, by_hand: bool, exclusive: bool, newest: bool) -> None:
    """Whether a card that is not here may come; see `Catalog.add`."""
    for error in history.unwelcome(session, [card], by_hand=by_hand).values():
        raise error
    if exclusive:
        _check_label_free(session, card)
    publisher, epoch = card.manifest.publisher, card.manifest.epoch
    if newest and publisher is not None and epoch < history.next_epoch(session, publisher, card.name):
        raise LabelTakenError(f"another card {card.name} was published meanwhile", hint="publish this one again")


def _check_same(row: CardRow, tombstone: Tombstone) -> None:
    """A tombstone speaks of its publisher's own card, and gets it right."""
    held = (row.publisher, row.name, row.version, row.epoch)
    said = (tombstone.publisher, tombstone.name, tombstone.version, tombstone.epoch)
    if held != said:
        raise CardIntegrityError(
            f"expected a tombstone of {row.name}@{row.version}, epoch {row.epoch}, by its publisher {row.publisher}, "
            f"got one of {tombstone.label}, epoch {tombstone.epoch}, by {tombstone.publisher}, so the card stays"
        )


def _check_label_free(session: Session, card: LoRACard) -> None:
    taken = select(LabelRow.digest).where(LabelRow.name == card.name, LabelRow.version == card.version)
    other = session.scalars(taken).first()
    if other is not None:
        raise LabelTakenError(
            f"{card.name}@{card.version} already means {other}, so {card.digest} cannot be published under it",
            hint=f"publish it as version {_next_version(session, card.name)}",
        )
    manifest = card.manifest
    if history.is_superseded(session, manifest.publisher, manifest.name, manifest.version, manifest.epoch):
        raise LabelTakenError(
            f"{card.manifest.publisher} has published {card.name}@{card.version} anew, so {card.digest}, which was "
            "signed before, cannot be published under it",
            hint="import it to keep it without its label",
        )


def _next_version(session: Session, name: str) -> str:
    return next_version(session.scalars(select(LabelRow.version).where(LabelRow.name == name)))


def _add_tags(session: Session, digest: Digest, tags: Iterable[str]) -> None:
    known = set(session.scalars(select(TagRow.tag).where(TagRow.digest == digest)))
    session.add_all(TagRow(digest=digest, tag=tag) for tag in sorted(set(tags) - known))
    session.flush()


def _resolve(session: Session, ref: str, *, quarantined: bool = False) -> Digest:
    name, _, version = ref.partition("@")
    query = select(LabelRow).where(LabelRow.name == name)
    best = newest(listing.labels(session, query.where(LabelRow.version == version) if "@" in ref else query))
    if best is not None:
        return best.digest
    found = _by_prefix(session, ref)
    if found is not None:
        return found
    held = quarantine.meant(session, ref)
    if held is None:
        raise _unknown(session, ref)
    if not quarantined:
        raise QuarantinedCardError(
            f"the card {ref[:200]} ({held}) is in quarantine, so it cannot be used",
            hint=f"`arrowmoe skills show {held}` says why, `arrowmoe skills admit {held}` lets it in",
        )
    return held


def _by_prefix(session: Session, ref: str) -> Digest | None:
    """The card whose digest `ref` is, or begins with; None if there is none. Raises `AmbiguousCardError`."""
    prefix = _DIGEST_PREFIX.fullmatch(ref)
    if prefix is None:
        return None
    start = f"blake3:{prefix[1].lower()}"
    which = CardRow.digest == start if is_digest(start) else CardRow.digest.startswith(start)
    found = sorted(session.scalars(_all().where(which).limit(3)))
    if len(found) > 1:
        raise AmbiguousCardError(
            f"{ref} is the start of several digests: {', '.join(found)}", hint="give more digits, or the name"
        )
    return Digest(found[0]) if found else None


def _unknown(session: Session, ref: str) -> UnknownCardError:
    if is_digest(ref):
        return UnknownCardError(f"no card is known as {ref!r}", hint="`arrowmoe skills sync` may bring it")
    names = sorted(set(session.scalars(select(LabelRow.name))))
    close = get_close_matches(ref.partition("@")[0], names, n=3)
    if close == [ref.partition("@")[0]]:
        versions = session.scalars(select(LabelRow.version).where(LabelRow.name == close[0]))
        close = [f"{close[0]}@{version}" for version in sorted(set(versions), key=version_key, reverse=True)[:3]]
    hint = (
        f"did you mean {' or '.join(close)}?" if close else "give a name, name@version, or 8 or more digits of a digest"
    )
    return UnknownCardError(f"no card is known as {ref[:200]!r}", hint=hint)


def _entry(session: Session, digest: str) -> CardEntry:
    found = listing.entries(session, select(CardRow.digest).where(CardRow.digest == digest))
    if not found:
        raise UnknownCardError(f"no card is known as {digest!r}", hint="another process may have removed it")
    return found[0]
