"""What the router goes by for each card, as the cards' manifests say it: no model is loaded."""

from __future__ import annotations

from typing import Any

from arrowmoe.base_names import logical_name, same_base
from arrowmoe.settings import Settings
from registry.card import LoRACard
from registry.entries import CardEntry
from registry.manifest import PROTOTYPES, ROUTES, SKETCH
from registry.store import Registry

Json = dict[str, Any]


def show(registry: Registry, settings: Settings, *, base: str | None) -> Json:
    """How the router is set, and what it goes by for each card (for `base`, if one is named)."""
    embedder = logical_name(settings.embedder)
    cards = newest(registry, None if base is None else logical_name(base))
    return {
        "embedder": embedder,
        **settings.router.model_dump(),
        "cards": [_shown(entry, card, embedder) for entry, card in cards],
    }


def newest(registry: Registry, base: str | None = None) -> list[tuple[CardEntry, LoRACard]]:
    """The newest version of each card that is no router; `base` keeps those that say they are for it."""
    found = [
        entry
        for entry in registry.newest()
        if base is None or (entry.base_name is not None and same_base(entry.base_name, base))
    ]
    cards = [(entry, registry.get(entry.digest)) for entry in found]
    return [(entry, card) for entry, card in cards if ROUTES not in card.manifest.training]


def summary(card: LoRACard) -> Json | None:
    """What a card's manifest says of its statistics; None if it has none."""
    spec = card.manifest.routing
    if spec is None:
        return None
    rows = {tensor.name: tensor.shape[0] for tensor in card.statistics.values()}
    return {
        "embedder": spec.embedder,
        "probe": spec.probe,
        "prompts": spec.count,
        "min_prompts": spec.min_prompts,
        "prototypes": rows[PROTOTYPES],
        "sketch_rank": rows.get(SKETCH, 0),
        "calibrated": spec.calibration,
        "nbytes": sum(tensor.nbytes for tensor in card.statistics.values()),
    }


def _shown(entry: CardEntry, card: LoRACard, embedder: str) -> Json:
    found = summary(card)
    return {
        "digest": entry.digest,
        "name": entry.name,
        "version": entry.version,
        "base_name": entry.base_name,
        "evidence": "statistics" if found and found["embedder"] == embedder else _words(entry),
        "statistics": found,
    }


def _words(entry: CardEntry) -> str:
    """What a card without statistics of this embedder is routed to by."""
    if any(text.strip() for text in entry.examples):
        return "examples"
    return "description" if entry.description.strip() else "name"


__all__ = ["newest", "show", "summary"]
