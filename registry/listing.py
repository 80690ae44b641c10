"""How entries are read from the catalog's tables, and in what order they are listed.

Each function works in the caller's transaction. Sorting is done here, not in SQL: databases collate differently.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime

from sqlalchemy import ColumnElement, Select, and_, exists, func, or_, select
from sqlalchemy.orm import Session

from registry.digest import Digest
from registry.entries import CardEntry, Origin
from registry.labels import Label, VersionKey, newest_first, version_key
from registry.tables import CardRow, EpochRow, LabelRow, OriginRow, QuarantineRow, TagRow

_LISTED = (
    CardRow.digest,
    CardRow.name,
    CardRow.version,
    CardRow.base_name,
    CardRow.architecture,
    CardRow.fingerprint,
    CardRow.rank,
    CardRow.nbytes,
    CardRow.description,
    CardRow.domains,
    CardRow.examples,
    CardRow.publisher,
    CardRow.epoch,
    CardRow.created,
    CardRow.added_at,
)


def labels(session: Session, which: Select[LabelRow]) -> Iterable[Label]:
    """The labels that `which` selects, each with its card's time of creation."""
    columns = (LabelRow.name, LabelRow.version, LabelRow.digest, CardRow.created)
    query = which.join(CardRow, CardRow.digest == LabelRow.digest).with_only_columns(*columns)
    for name, version, digest, created in session.execute(query):
        yield Label(name=name, version=version, digest=Digest(digest), created=created)


def entries(session: Session, which: Select[str]) -> list[CardEntry]:
    """The entries of the digests that `which` selects: one query for each table, none for each card."""
    tags, named = _tags_of(session, which), _labels_of(session, which)
    columns = (*_LISTED, EpochRow.epoch, OriginRow.peer_id, OriginRow.address, QuarantineRow.reason)
    query = select(*columns).where(CardRow.digest.in_(which)).outerjoin(EpochRow, _SAME_LABEL)
    query = query.outerjoin(OriginRow, OriginRow.digest == CardRow.digest)
    query = query.outerjoin(QuarantineRow, QuarantineRow.digest == CardRow.digest)
    found = []
    for *own, seen, peer_id, address, quarantined in session.execute(query):
        fields = dict(zip(_FIELDS, own, strict=True))
        fields["domains"], fields["examples"] = tuple(fields["domains"]), tuple(fields["examples"])
        digest = fields["digest"]
        origin = None if peer_id is None else Origin(peer_id=peer_id, address=address)
        found.append(
            CardEntry(
                **fields,
                tags=tags.get(digest, ()),
                labels=named.get(digest, ()),
                origin=origin,
                superseded=seen is not None and fields["epoch"] < seen,
                quarantined=quarantined,
            )
        )
    return found


_SAME_LABEL = and_(
    EpochRow.publisher == CardRow.publisher, EpochRow.name == CardRow.name, EpochRow.version == CardRow.version
)
_FIELDS = tuple(column.key for column in _LISTED)


def _tags_of(session: Session, which: Select[str]) -> dict[str, tuple[str, ...]]:
    tags: dict[str, list[str]] = defaultdict(list)
    for digest, tag in session.execute(select(TagRow.digest, TagRow.tag).where(TagRow.digest.in_(which))):
        tags[digest].append(tag)
    return {digest: tuple(sorted(own)) for digest, own in tags.items()}


def _labels_of(session: Session, which: Select[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[Label]] = defaultdict(list)
    for label in labels(session, select(LabelRow).where(LabelRow.digest.in_(which))):
        found[label.digest].append(label)
    return {
        digest: tuple(map(str, sorted(newest_first(own), key=lambda label: label.name)))
        for digest, own in found.items()
    }


def in_order(found: Iterable[CardEntry]) -> list[CardEntry]:
    """By name; within a name the newest version first, and of one version what was published anew last."""
    newest = sorted(found, key=_recency, reverse=True)
    return sorted(newest, key=lambda entry: entry.name)


def _recency(entry: CardEntry) -> tuple[VersionKey, bool, datetime, str]:
    return (version_key(entry.version), not entry.superseded, entry.created, entry.digest)


def of_name(name: str) -> ColumnElement[bool]:
    """The condition that a card is called so, by its manifest or by a label."""
    return or_(CardRow.name == name, CardRow.digest.in_(select(LabelRow.digest).where(LabelRow.name == name)))


def of_base(base: str) -> ColumnElement[bool]:
    """The condition that a card is for the base model of this name, architecture or fingerprint."""
    return or_(CardRow.base_name == base, CardRow.architecture == base, CardRow.fingerprint == base)


def tagged(tag: str) -> ColumnElement[bool]:
    """The condition that a card has this tag."""
    return CardRow.digest.in_(select(TagRow.digest).where(TagRow.tag == tag))


def holds_word(word: str) -> ColumnElement[bool]:
    """The condition that a card has `word` in what is searched, or in a tag."""
    named = exists().where(TagRow.digest == CardRow.digest, func.lower(TagRow.tag).contains(word, autoescape=True))
    return or_(CardRow.search_text.contains(word, autoescape=True), named)


__all__ = ["entries", "holds_word", "in_order", "labels", "of_base", "of_name", "tagged"]
