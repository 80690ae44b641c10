"""What changed in a catalog, by number, and what a reader of these changes knows. Pure.

As Syncthing's index exchange: each change has the next number under the catalog's random index id, and only the latest
of each card is kept. Whoever knows the catalog up to a number asks for what came after; under another index id, or
where the numbers went back (a catalog restored from a copy), what was known is worth nothing, and is read anew from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from registry.digest import Digest
from registry.tombstones import Tombstone


class Kind(StrEnum):
    """What became of a card: it came; its publisher removed it everywhere; it only is not here any more."""

    ADDED = "added"
    REMOVED = "removed"
    GONE = "gone"


@dataclass(frozen=True, kw_only=True)
class Change:
    """The latest change of one card; a removed one's `tombstone` proves it to whoever else holds the card."""

    sequence: int
    digest: Digest
    kind: Kind
    tombstone: Tombstone | None = None


@dataclass(frozen=True, kw_only=True)
class Changes:
    """A page: changes after `since`, in order. `last` is the number of the catalog's latest change, 0 for none."""

    index_id: str
    since: int
    last: int
    entries: tuple[Change, ...]

    @property
    def upto(self) -> int:
        """The number up to which this page tells everything that `since` did not."""
        return self.entries[-1].sequence if self.entries else self.last

    @property
    def more(self) -> bool:
        """Whether another page follows."""
        return self.upto < self.last

    @property
    def tombstones(self) -> tuple[Tombstone, ...]:
        """The page's tombstones, each to be verified before it is applied."""
        return tuple(change.tombstone for change in self.entries if change.tombstone is not None)


@dataclass(frozen=True, kw_only=True)
class Position:
    """Up to which change a catalog is known: number `upto` under `index_id`; by default nothing of it is."""

    index_id: str | None = None
    upto: int = 0


__all__ = ["Change", "Changes", "Kind", "Position"]
