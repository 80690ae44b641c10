"""Cards that come into the catalog, one or many in one transaction: the rows that they make.

What is known is read once for all of them, and written table by table, so that a thousand small cards cost hardly more
than one. Each function works in the caller's transaction; whether a card may come, the caller has decided.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from registry import history, quarantine
from registry.card import LoRACard
from registry.changes import Kind
from registry.entries import Origin
from registry.history import Edition
from registry.tables import CardRow, LabelRow, OriginRow, PublisherRow

_Row: TypeAlias = "dict[str, Any]"


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A verified card that comes in from `origin`; None: by the owner's hand.

    `quarantine_for`: why it is not to be used yet, if so. `draft`: the file in which it lies, if it came by one.
    """

    card: LoRACard
    origin: Origin | None = None
    quarantine_for: str | None = None
    draft: Path | None = None


def enter(session: Session, arrivals: Sequence[Arrival]) -> None:
    """Put the cards in, each at most once; one that was here in quarantine leaves it, unless it has a new reason."""
    now = datetime.now(UTC)
    digests = [arrival.card.digest for arrival in arrivals]
    known = set(session.scalars(select(CardRow.digest).where(CardRow.digest.in_(digests))))
    new = [arrival for arrival in arrivals if arrival.card.digest not in known]
    _insert(session, new, now)
    quarantine.put(session, {a.card.digest: a.quarantine_for for a in new if a.quarantine_for is not None})
    admitted = [arrival.card for arrival in arrivals if arrival.quarantine_for is None]
    quarantine.lift(session, [card.digest for card in admitted])
    activate(session, [_edition_of(card) for card in admitted])


def activate(session: Session, editions: Collection[Edition]) -> None:
    """Give cards their labels, unless a later one of its publisher has one, and let others know of the cards."""
    if not editions:
        return
    newest = history.advance(session, editions)
    labels = [
        {"name": edition.name, "version": edition.version, "digest": edition.digest}
        for edition in editions
        if edition.key is None or edition.epoch >= newest[edition.key]
    ]
    if labels:
        session.execute(insert(LabelRow), labels)
    history.show(session, [edition.digest for edition in editions])
    history.record(session, [(edition.digest, edition.publisher) for edition in editions], Kind.ADDED)


def _insert(session: Session, arrivals: Sequence[Arrival], now: datetime) -> None:
    """The cards' rows and where they came from; they go by no label yet. The order is that of the foreign keys."""
    signatures = [arrival.card.signature for arrival in arrivals]
    keys = {signature.publisher: signature.public_key for signature in signatures if signature is not None}
    known = set(session.scalars(select(PublisherRow.fingerprint).where(PublisherRow.fingerprint.in_(keys))))
    publishers: list[_Row] = [
        {"fingerprint": publisher, "public_key": key, "first_seen": now}
        for publisher, key in keys.items()
        if publisher not in known
    ]
    origins: list[_Row] = [
        {"digest": arrival.card.digest, "peer_id": arrival.origin.peer_id, "address": arrival.origin.address}
        for arrival in arrivals
        if arrival.origin is not None
    ]
    cards = [_row_of(arrival.card, now) for arrival in arrivals]
    tables: Mapping[type, list[_Row]] = {PublisherRow: publishers, CardRow: cards, OriginRow: origins}
    for table, rows in tables.items():
        if rows:
            session.execute(insert(table), rows)


def _edition_of(card: LoRACard) -> Edition:
    manifest = card.manifest
    return Edition(
        digest=card.digest,
        publisher=manifest.publisher,
        name=manifest.name,
        version=manifest.version,
        epoch=manifest.epoch,
    )


def _row_of(card: LoRACard, added_at: datetime) -> _Row:
    manifest = card.manifest
    searched = (manifest.name, manifest.description, *manifest.domains, *manifest.examples)
    return {
        "digest": card.digest,
        "name": manifest.name,
        "version": manifest.version,
        "base_name": manifest.base.name,
        "architecture": manifest.base.architecture,
        "fingerprint": manifest.base.fingerprint,
        "rank": manifest.adapter.rank,
        "nbytes": card.nbytes,
        "description": manifest.description,
        "domains": list(manifest.domains),
        "examples": list(manifest.examples),
        "search_text": "\n".join(searched).casefold(),
        "publisher": manifest.publisher,
        "epoch": manifest.epoch,
        "created": _in_utc(manifest.created),
        "added_at": added_at,
    }


def _in_utc(moment: datetime) -> datetime:
    """In UTC; a moment that lies beyond the calendar there is moved to its edge."""
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        return (datetime.min if moment.year == 1 else datetime.max).replace(tzinfo=UTC)


__all__ = ["Arrival", "activate", "enter"]
