"""What other nodes have, as they say themselves: kept, so that after a restart only what changed is asked for.

An entry is the text that the floor above made of a peer's word; here it is a text. Only digests can be verified.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sqlalchemy import delete, exists, func, insert, select
from sqlalchemy.orm import Session

from registry.changes import Position
from registry.database import Database
from registry.digest import Digest
from registry.tables import CardRow, HiddenRow, PeerCardRow, PeerIndexRow


@dataclass(frozen=True, kw_only=True)
class InventorySize:
    """How much is kept of one node: cards, and characters of their entries."""

    cards: int = 0
    chars: int = 0


class Inventories:
    """The cards of other nodes, by node id. Each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def position(self, node_id: str) -> Position:
        """Up to which change the node's catalog is known here."""
        with self._database.reading() as session:
            return _position(session, node_id)

    def note(
        self, node_id: str, *, since: int, told: Position, added: Mapping[Digest, str], gone: Iterable[Digest]
    ) -> Position:
        """Keep what changed between `since` and `told`; from 0 on it takes the place of all that was known.

        Returns what is known now: where it does not follow on what is known, for somebody else noted changes of this
        node meanwhile, nothing is kept.
        """
        with self._database.writing() as session:
            known = _position(session, node_id)
            if since and known != Position(index_id=told.index_id, upto=since):
                return known
            if since == 0:
                _forget(session, node_id)
            changed = delete(PeerCardRow).where(PeerCardRow.node_id == node_id)
            session.execute(changed.where(PeerCardRow.digest.in_((*added, *gone))))
            rows = [{"node_id": node_id, "digest": digest, "entry": entry} for digest, entry in added.items()]
            if rows:
                session.execute(insert(PeerCardRow), rows)
            session.merge(PeerIndexRow(node_id=node_id, index_id=told.index_id, upto=told.upto))
            return told

    def lacking(self, node_id: str) -> list[str]:
        """The entries of its cards that are not here, and that this node's owner has not hidden; by digest."""
        here = exists().where(CardRow.digest == PeerCardRow.digest)
        hidden = exists().where(HiddenRow.digest == PeerCardRow.digest)
        query = select(PeerCardRow.entry).where(PeerCardRow.node_id == node_id, ~here, ~hidden)
        with self._database.reading() as session:
            return list(session.scalars(query.order_by(PeerCardRow.digest)))

    def count(self, node_id: str) -> int:
        """How many cards it has."""
        with self._database.reading() as session:
            return session.scalar(select(func.count()).where(PeerCardRow.node_id == node_id)) or 0

    def size(self, node_id: str) -> InventorySize:
        """How much is kept of it here."""
        query = select(func.count(), func.sum(func.length(PeerCardRow.entry))).where(PeerCardRow.node_id == node_id)
        with self._database.reading() as session:
            cards, chars = session.execute(query).one()
        return InventorySize(cards=cards, chars=chars or 0)

    def holders(self, digest: Digest) -> list[str]:
        """The nodes that have the card, as they say."""
        query = select(PeerCardRow.node_id).where(PeerCardRow.digest == digest)
        with self._database.reading() as session:
            return sorted(session.scalars(query))

    def forget(self, node_id: str) -> None:
        """Know nothing of the node's cards any more."""
        with self._database.writing() as session:
            _forget(session, node_id)


def _position(session: Session, node_id: str) -> Position:
    row = session.get(PeerIndexRow, node_id)
    return Position() if row is None else Position(index_id=row.index_id, upto=row.upto)


def _forget(session: Session, node_id: str) -> None:
    for table in (PeerCardRow, PeerIndexRow):
        session.execute(delete(table).where(table.node_id == node_id))


__all__ = ["Inventories", "InventorySize"]
