"""The catalog's tables (SQLAlchemy typed ORM), portable between SQLite and PostgreSQL.

A change here needs a migration in `registry/migrations/versions` and a new `HEAD_REVISION`; a test compares them.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, DateTime, Dialect, Double, ForeignKey, Index, LargeBinary, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator, TypeEngine

HEAD_REVISION = "0004"
"""The schema that this code speaks; known here so that opening an up-to-date catalog need not import Alembic."""


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime in UTC; SQLite, which keeps no zone, stores it without one."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """From UTC, with the zone that SQLite dropped."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """Root of the tables."""

    type_annotation_map: ClassVar[dict[type, type[TypeEngine[Any]]]] = {datetime: UtcDateTime, float: Double}


class PublisherRow(Base):
    """A key that signed a card, since when it is known here."""

    __tablename__ = "publishers"

    fingerprint: Mapped[str] = mapped_column(String(32), primary_key=True)
    public_key: Mapped[bytes] = mapped_column(LargeBinary(32))
    first_seen: Mapped[datetime]


class CardRow(Base):
    """A card: all that a list, a search or an inventory needs, so that none of them opens a file."""

    __tablename__ = "cards"

    digest: Mapped[str] = mapped_column(String(71), primary_key=True)
    name: Mapped[str] = mapped_column(String(96), index=True)
    version: Mapped[str] = mapped_column(String(32))
    base_name: Mapped[str | None] = mapped_column(Text)
    architecture: Mapped[str | None] = mapped_column(Text)
    fingerprint: Mapped[str] = mapped_column(String(71))
    rank: Mapped[int]
    nbytes: Mapped[int] = mapped_column(BigInteger)
    description: Mapped[str] = mapped_column(Text)
    domains: Mapped[list[str]] = mapped_column(JSON)
    examples: Mapped[list[str]] = mapped_column(JSON)
    search_text: Mapped[str] = mapped_column(Text)
    """Name, description, domains and examples, case-folded (a database's own `lower` knows only ASCII)."""
    publisher: Mapped[str | None] = mapped_column(ForeignKey("publishers.fingerprint"))
    epoch: Mapped[int] = mapped_column(BigInteger)
    created: Mapped[datetime]
    added_at: Mapped[datetime]


class LabelRow(Base):
    """A name and a version that a card goes by. Two nodes may use one label for two cards: both rows are kept."""

    __tablename__ = "labels"
    __table_args__ = (Index("ix_labels_digest", "digest"),)

    name: Mapped[str] = mapped_column(String(96), primary_key=True)
    version: Mapped[str] = mapped_column(String(32), primary_key=True)
    digest: Mapped[str] = mapped_column(ForeignKey("cards.digest", ondelete="CASCADE"), primary_key=True)


class TagRow(Base):
    """A word that this node's owner put on a card."""

    __tablename__ = "tags"
    __table_args__ = (Index("ix_tags_tag", "tag"),)

    digest: Mapped[str] = mapped_column(ForeignKey("cards.digest", ondelete="CASCADE"), primary_key=True)
    tag: Mapped[str] = mapped_column(String(96), primary_key=True)


class OriginRow(Base):
    """The peer that a card first came from."""

    __tablename__ = "origins"

    digest: Mapped[str] = mapped_column(ForeignKey("cards.digest", ondelete="CASCADE"), primary_key=True)
    peer_id: Mapped[str] = mapped_column(Text)
    address: Mapped[str] = mapped_column(Text)


class EpochRow(Base):
    """The greatest epoch seen of a publisher, a name and a version, in cards and tombstones; it never falls."""

    __tablename__ = "epochs"

    publisher: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(96), primary_key=True)
    version: Mapped[str] = mapped_column(String(32), primary_key=True)
    epoch: Mapped[int] = mapped_column(BigInteger)


class TombstoneRow(Base):
    """A publisher's word that their card is removed, kept for good; of another publisher's card it says nothing."""

    __tablename__ = "tombstones"

    digest: Mapped[str] = mapped_column(String(71), primary_key=True)
    publisher: Mapped[str] = mapped_column(String(32), primary_key=True)
    body: Mapped[bytes] = mapped_column(LargeBinary)
    signature: Mapped[str] = mapped_column(Text)


class HiddenRow(Base):
    """A card that this node's owner removed and only its publisher could remove everywhere."""

    __tablename__ = "hidden"

    digest: Mapped[str] = mapped_column(String(71), primary_key=True)
    name: Mapped[str] = mapped_column(String(96))
    version: Mapped[str] = mapped_column(String(32))
    publisher: Mapped[str | None] = mapped_column(String(32))
    hidden_at: Mapped[datetime]


class ChangeRow(Base):
    """The latest change of a card, by number; an earlier one of the same card is forgotten."""

    __tablename__ = "changes"

    digest: Mapped[str] = mapped_column(String(71), primary_key=True)
    publisher: Mapped[str] = mapped_column(String(32), primary_key=True)
    """Empty for a card that nobody signed."""
    sequence: Mapped[int] = mapped_column(BigInteger, unique=True)
    kind: Mapped[str] = mapped_column(String(8))


class IndexRow(Base):
    """One row: the random id under which the changes of this database are numbered."""

    __tablename__ = "change_index"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)


class PeerRow(Base):
    """A node that was met, announced or invited, and what this node's owner thinks of it."""

    __tablename__ = "peers"

    node_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    address: Mapped[str | None] = mapped_column(Text)
    """HOST:PORT, where it was last found."""
    state: Mapped[str] = mapped_column(String(8))
    introducer: Mapped[bool]
    """Whether the nodes that it has approved are approved here as well."""
    introduced_by: Mapped[str | None] = mapped_column(String(32))
    first_seen: Mapped[datetime]
    last_seen: Mapped[datetime | None]
    decided: Mapped[datetime | None]


class InviteRow(Base):
    """A token that lets one node join; of its secret only the hash is kept."""

    __tablename__ = "invites"

    secret_hash: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)
    created: Mapped[datetime]
    expires: Mapped[datetime]
    used_by: Mapped[str | None] = mapped_column(String(32))


class PeerIndexRow(Base):
    """Up to which change another node's catalog is known here."""

    __tablename__ = "peer_indexes"

    node_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    index_id: Mapped[str] = mapped_column(String(32))
    upto: Mapped[int] = mapped_column(BigInteger)


class PeerCardRow(Base):
    """A card that another node has, as it says itself."""

    __tablename__ = "peer_cards"
    __table_args__ = (Index("ix_peer_cards_digest", "digest"),)

    node_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    digest: Mapped[str] = mapped_column(String(71), primary_key=True)
    entry: Mapped[str] = mapped_column(Text)
    """Its inventory entry, the JSON that the peer sent."""


class QuarantineRow(Base):
    """A card that is here and is neither used nor passed on, until its owner lets it, and why."""

    __tablename__ = "quarantine"

    digest: Mapped[str] = mapped_column(ForeignKey("cards.digest", ondelete="CASCADE"), primary_key=True)
    reason: Mapped[str] = mapped_column(Text)
    since: Mapped[datetime]
