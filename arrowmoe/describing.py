"""Describing a card: prompts go in, and a new version of the card comes out that routers know without them.

What is kept of prompts are statistics, never their text; which of its words a card shows is its owner's to say
(description, examples). docs/privacy.md tells what the statistics give away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arrowmoe.features import Features, Featurizer, Vectors
from arrowmoe.router_view import newest
from arrowmoe.routing.acceptance import Prompts, describe
from arrowmoe.routing.dataset import RoutingDataError, RoutingExample, read_examples
from arrowmoe.routing.probe import Probe
from arrowmoe.routing.statistics import MIN_PROMPTS, CardStatistics
from arrowmoe.routing.texts import phrases
from registry.card import LoRACard
from registry.entries import CardEntry
from registry.manifest import MAX_STATISTICS_BYTES
from registry.store import Registry

EMBEDDED_AT_ONCE = 256
Progress = Callable[[str, float, float], None]
"""Text, done and total so far; a total of 0 means nobody knows."""


@dataclass(frozen=True, kw_only=True)
class Indexed:
    """A card that a router over a registry chooses from."""

    entry: CardEntry
    card: LoRACard

    @property
    def statistics(self) -> CardStatistics | None:
        """What the card carries; None if it carries none. Raises `RoutingError` for statistics that cannot be."""
        spec = self.card.manifest.routing
        return None if spec is None else CardStatistics.of(spec, self.card.statistics)


class RememberingFeaturizer:
    """Another featurizer's features, each text embedded once, and progress told."""

    def __init__(self, featurizer: Featurizer, on_progress: Progress = lambda text, done, total: None) -> None:
        self._featurizer, self._on_progress = featurizer, on_progress
        self._known: dict[str, Vectors] = {}

    @property
    def embedder(self) -> str:
        """Name of the other featurizer's space."""
        return self._featurizer.embedder

    def features(self, texts: Sequence[str]) -> Features:
        """Features of `texts`, at least one."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        for start in range(0, len(new), EMBEDDED_AT_ONCE):
            self._on_progress("embedding", start, len(new))
            chunk = new[start : start + EMBEDDED_AT_ONCE]
            self._known.update(zip(chunk, self._featurizer.features(chunk).vectors, strict=True))
        vectors = np.stack([self._known[text] for text in texts])
        return Features(texts=tuple(texts), vectors=vectors, embedder=self.embedder)


@dataclass(frozen=True, kw_only=True)
class Describer:
    """Makes statistics in one embedder's space, with prototypes of at least `min_prompts` prompts."""

    featurizer: Featurizer
    probe: Probe
    min_prompts: int = MIN_PROMPTS
    budget_bytes: int = MAX_STATISTICS_BYTES

    def described(
        self, card: LoRACard, prompts: Sequence[RoutingExample], *, held_out: Sequence[RoutingExample] = ()
    ) -> LoRACard:
        """A new, unsigned card with statistics of `prompts`, and of the phrases that its description shows anyway.

        Labels of the prompts, if there are any, give a prototype each. `held_out` calibrate, else the prompts do by
        cross-fitting. Raises `RoutingError` where there is nothing to describe, or no room for it.
        """
        described = Prompts(
            vectors=self._vectors([prompt.text for prompt in prompts]),
            labels=[prompt.label for prompt in prompts],
            public=self._vectors(phrases(card.manifest.description)),
            held_out=self._vectors([prompt.text for prompt in held_out]),
        )
        found = describe(described, self.probe, min_prompts=self.min_prompts, budget_bytes=self.budget_bytes)
        return found.put_into(card)

    def _vectors(self, texts: Sequence[str]) -> Vectors:
        if not texts:
            return np.zeros((0, len(self.probe.mean)), dtype=np.float32)
        return self.featurizer.features(texts).vectors


def indexed(registry: Registry, base: str | None = None) -> list[Indexed]:
    """What a router chooses from: the newest version of each card; `base` keeps those that say they are for it."""
    return [Indexed(entry=entry, card=card) for entry, card in newest(registry, base)]


def read_prompts(path: Path, card: str) -> tuple[list[RoutingExample], int]:
    """Prompts of `card` in a file of one prompt a line or of JSON rows, and how many rows were of other cards.

    Raises `RoutingDataError`.
    """
    text = read_text(path)
    if text.lstrip().startswith("{"):
        rows = read_examples(path, card=card)
    else:
        rows = [RoutingExample(text=line.strip(), card=card) for line in text.splitlines() if line.strip()]
    own = [row for row in rows if row.card == card]
    if not own:
        raise RoutingDataError(f"{path}: expected prompts of card {card!r}, got none in {len(rows)} rows")
    return own, len(rows) - len(own)


def read_dataset(path: Path) -> list[RoutingExample]:
    """The rows of a routing dataset, at least one. Raises `RoutingDataError`."""
    read_text(path)
    rows = read_examples(path)
    if not rows:
        raise RoutingDataError(f"{path}: expected rows of a routing dataset, got none")
    return rows


def read_text(path: Path) -> str:
    """A file's text. Raises `RoutingDataError` where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RoutingDataError(f"{path}: expected a file of prompts that can be read, got: {error}") from error


__all__ = [
    "Describer",
    "Indexed",
    "Progress",
    "RememberingFeaturizer",
    "indexed",
    "read_dataset",
    "read_prompts",
]
