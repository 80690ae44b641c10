"""What a peer has and this node has not, and what of it is wanted. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from federation.wire import InventoryEntry
from registry.card import LoRACard
from registry.digest import Digest


@dataclass(frozen=True, kw_only=True)
class SyncFilter:
    """Which cards are wanted: those that fit every field that is given; by default all.

    A field of several is a choice. `names` and `domains` are patterns (``*``, ``?``, ``[abc]``), of names or labels
    NAME@VERSION, and of domains; `names` may also be digests.
    """

    names: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()
    """Names, architectures or fingerprints of base models."""
    publishers: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    max_bytes: int | None = None
    """Of a card's tensors."""
    but: frozenset[str] = frozenset()
    """Digests that are not wanted, whatever else fits."""

    def wants(self, entry: InventoryEntry) -> bool:
        """Whether the card of `entry` is wanted, if what the peer says of it is true."""
        return (
            entry.digest not in self.but
            and (entry.digest in self.names or _fits((entry.name, entry.label), self.names))
            and _among((entry.base_name, entry.architecture, entry.fingerprint), self.bases)
            and _among((entry.publisher,), self.publishers)
            and _fits(entry.domains, self.domains)
            and (self.max_bytes is None or entry.nbytes <= self.max_bytes)
        )


def missing(inventory: Iterable[InventoryEntry], have: Collection[Digest]) -> list[InventoryEntry]:
    """The entries whose card is not in `have`, each digest once, in the inventory's order."""
    wanted: dict[Digest, InventoryEntry] = {}
    for entry in inventory:
        if entry.digest not in have:
            wanted.setdefault(entry.digest, entry)
    return list(wanted.values())


def entry_of(card: LoRACard) -> InventoryEntry:
    """What the card says of itself, as an entry; a peer's entry is only what that peer says of it."""
    manifest = card.manifest
    return InventoryEntry(
        digest=card.digest,
        name=manifest.name,
        version=manifest.version,
        base_name=manifest.base.name,
        architecture=manifest.base.architecture,
        fingerprint=manifest.base.fingerprint,
        rank=manifest.adapter.rank,
        nbytes=manifest.tensor_bytes,
        description=manifest.description,
        domains=manifest.domains,
        examples=manifest.examples,
        publisher=manifest.publisher,
        has_statistics=manifest.routing is not None,
    )


def _fits(texts: Iterable[str], patterns: Collection[str]) -> bool:
    return not patterns or any(fnmatchcase(text, pattern) for text in texts for pattern in patterns)


def _among(texts: Iterable[str | None], choice: Collection[str]) -> bool:
    return not choice or any(text in choice for text in texts)


__all__ = ["SyncFilter", "entry_of", "missing"]
