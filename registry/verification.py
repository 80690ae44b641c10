"""Whether a card's file, its manifest and its row agree."""

from __future__ import annotations

from registry.blobs import BlobStore
from registry.catalog import Catalog
from registry.digest import Digest
from registry.entries import VerifyReport
from registry.errors import CardError, MissingFileError
from registry.pending import Pending

_ON_DAMAGE = "import the card again from where it came, or remove it and sync it from a peer"


def verified(digest: Digest, catalog: Catalog, blobs: BlobStore, pending: Pending) -> VerifyReport | None:
    """What is wrong with one card, every byte of which is read; None if it is gone meanwhile."""
    with pending.looking_at(digest):
        entry = catalog.entry(digest, quarantined=True) if catalog.holds(digest) else None
        if entry is None and not blobs.holds(digest):
            return None
        try:
            card = blobs.load(digest, verify=True, memory_map=False)
        except (CardError, MissingFileError) as error:
            hint = _ON_DAMAGE if entry else f"no row mentions it: delete {blobs.place_of(digest)}"
            return VerifyReport(digest=digest, entry=entry, reason=str(error), hint=hint)
    if entry is None:
        hint = f"import it ({blobs.path_of(digest)}) to keep the card, or delete it"
        return VerifyReport(digest=digest, entry=None, reason="a file without a row in the catalog", hint=hint)
    if (card.name, card.version, card.nbytes) != (entry.name, entry.version, entry.nbytes):
        reason = f"the catalog says {entry.name}@{entry.version}, the card {card.name}@{card.version}"
        return VerifyReport(digest=digest, entry=entry, reason=reason, hint=_ON_DAMAGE)
    return VerifyReport(digest=digest, entry=entry)


__all__ = ["verified"]
