"""How a node signs a card that it publishes: with its next epoch of the name, unless that was published before."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace

from registry.blobs import BlobStore
from registry.card import LoRACard
from registry.catalog import Catalog
from registry.errors import CardError, MissingFileError
from registry.identity import Identity


class Signer:
    """Signs the cards of one registry's node."""

    def __init__(self, identity: Identity, catalog: Catalog, blobs: BlobStore) -> None:
        self._identity, self._catalog, self._blobs = identity, catalog, blobs

    def signed(self, card: LoRACard) -> LoRACard:
        """This card as it was published before, else with the next epoch and this node's signature."""
        before = self._published_before(card)
        if before is not None:
            return before
        return self._with_epoch(card, self._catalog.next_epoch(self._identity.id, card.name))

    def _with_epoch(self, card: LoRACard, epoch: int) -> LoRACard:
        return card.describe(epoch=epoch).signed(self._identity)

    def _published_before(self, card: LoRACard) -> LoRACard | None:
        """This card as it was published before, if the one that has its label differs in nothing but its making.

        None if the label is free. Raises `LabelTakenError`.
        """
        entry = self._catalog.labelled(card.name, card.version)
        if entry is None:
            return None
        known = self._with_epoch(card, entry.epoch)  # the same bytes would heal a file that is lost or damaged
        if known.digest == entry.digest:
            return known
        with suppress(CardError, MissingFileError):
            known = self._blobs.load(entry.digest)
            if _without_making(known) == _without_making(card):
                return replace(known, tensors=card.tensors)
        self._catalog.check(card, by_hand=True, exclusive=True, newest=False)
        return None


def _without_making(card: LoRACard) -> dict[str, object]:
    fields: dict[str, object] = json.loads(card.manifest_bytes)
    return {key: value for key, value in fields.items() if key not in ("created", "publisher", "epoch")}


__all__ = ["Signer"]
