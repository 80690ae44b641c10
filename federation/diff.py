"""What a peer has and this node has not. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from federation.wire import InventoryEntry
from registry.digest import Digest


def missing(inventory: Iterable[InventoryEntry], have: Collection[Digest]) -> list[InventoryEntry]:
    """The entries whose card is not in `have`, each digest once, in the inventory's order."""
    wanted: dict[Digest, InventoryEntry] = {}
    for entry in inventory:
        if entry.digest not in have:
            wanted.setdefault(entry.digest, entry)
    return list(wanted.values())


def selected(entry: InventoryEntry, only: Collection[str] | None) -> bool:
    """Whether `only` (names, labels NAME@VERSION, or digests; None for everything) asks for `entry`."""
    return only is None or not {entry.name, entry.label, entry.digest}.isdisjoint(only)


__all__ = ["missing", "selected"]
