"""What changed in a catalog, by number, and what a reader of these changes knows. Pure.

As Syncthing's index exchange: each change has the next number under the catalog's random index id, and only the latest
of each card is kept. Whoever knows the catalog up to a number asks for what came after; under another index id, or
where the numbers went back (a catalog restored from a copy), what was known is worth nothing, and is read anew from 0.
"""

from __future__ import annotations

from collections.abc import Iterable
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
class Inventory:
    """What is known of another catalog: its cards as of change `upto` under `index_id`."""

    index_id: str | None = None
    upto: int = 0
    digests: frozenset[Digest] = frozenset()


def merged(known: Inventory, page: Changes) -> Inventory:
    """What is known after `page`, the latest that was asked for, since `known.upto` or before.

    If `upto` is 0 afterwards though `page.last` is not, what was known is worth nothing: ask again, since 0. Raises
    `ValueError` for a page that begins later than what is known ends.
    """
    if page.index_id != known.index_id or page.last < known.upto:
        known = Inventory(index_id=page.index_id)
        if page.since > 0:
            return known
    if page.since > known.upto:
        raise ValueError(f"expected changes since {known.upto} or before, got those since {page.since}")
    news = [change for change in page.entries if change.sequence > known.upto]
    return Inventory(
        index_id=page.index_id, upto=max(known.upto, page.upto), digests=frozenset(_after(known.digests, news))
    )


def _after(digests: Iterable[Digest], news: Iterable[Change]) -> set[Digest]:
    there = set(digests)
    for change in news:
        if change.kind is Kind.ADDED:
            there.add(change.digest)
        else:
            there.discard(change.digest)
    return there


__all__ = ["Change", "Changes", "Inventory", "Kind", "merged"]
