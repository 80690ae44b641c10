"""The router: cards are registered and unregistered as they come and go; features go in, gates with reasons come out.

It decides without I/O but for one thing: the featurizer embeds a card's own words when the card is registered. A card
that a peer holds is a *virtual candidate*: routed to like any other, fetched when it is chosen.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from arrowmoe.base_model import same_base
from arrowmoe.errors import RoutingError
from arrowmoe.features import Features, Featurizer, Vectors
from arrowmoe.routing.gates import Candidate, Decision, Gates
from arrowmoe.routing.index import PrototypeIndex

DEFAULT_THRESHOLD = 0.30
DEFAULT_TEMPERATURE = 0.1
SHOWN_CANDIDATES = 5


class Describable(Protocol):
    """What a router reads of a card: its own catalog's entry and a peer's inventory entry both have it."""

    @property
    def digest(self) -> str:
        """The card's identity."""

    @property
    def name(self) -> str:
        """The card's name."""

    @property
    def base_name(self) -> str | None:
        """Logical name of its base model."""

    @property
    def description(self) -> str:
        """What it is for, in a sentence."""

    @property
    def examples(self) -> Sequence[str]:
        """Prompts that it is for."""


class Router(Protocol):
    """Features in, gates out."""

    def route(self, features: Features, *, mask: Collection[str] | None = None) -> Gates:
        """Gates with one row per row of `features`; `mask` are the digests that may be chosen, None is all."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    name: str
    base_name: str | None
    prototypes: tuple[str, ...]
    virtual: bool
    source: str | None


class LoRARouter:
    """Routes by the cosine between a prompt and a card's description and example prompts.

    The best card of a row is chosen if it scores at least `threshold`; with `top_k` above 1 up to that many, weighted
    by the softmax of their scores over `temperature`. A row where no card reaches the threshold abstains: bare base.
    """

    def __init__(
        self,
        featurizer: Featurizer,
        *,
        threshold: float = DEFAULT_THRESHOLD,
        top_k: int = 1,
        temperature: float = DEFAULT_TEMPERATURE,
    ) -> None:
        if top_k < 1 or temperature <= 0:
            raise RoutingError(f"expected top_k >= 1 and temperature > 0, got {top_k} and {temperature}")
        self.threshold = threshold
        self.top_k = top_k
        self.temperature = temperature
        self._featurizer = featurizer
        self._index = PrototypeIndex()
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def digests(self) -> set[str]:
        """Digests of all indexed cards, virtual ones among them."""
        return set(self._entries)

    def is_virtual(self, digest: str) -> bool:
        """Whether a card is indexed whose weights are with a peer only."""
        entry = self._entries.get(digest)
        return entry is not None and entry.virtual

    def register_card(self, card: Describable) -> None:
        """Index a card whose weights are here; a virtual candidate of the same digest becomes real."""
        self._register(card, virtual=False, source=None)

    def register_virtual_candidate(self, card: Describable, source: str) -> None:
        """Index a card that peer `source` offers; a card that is already here stays what it is."""
        if card.digest not in self._entries or self._entries[card.digest].virtual:
            self._register(card, virtual=True, source=source)

    def unregister(self, digest: str) -> bool:
        """Forget a card; whether it was indexed."""
        with self._lock:
            self._entries.pop(digest, None)
            return self._index.remove(digest)

    def features(self, texts: Sequence[str]) -> Features:
        """Features of `texts` by this router's own featurizer."""
        return self._featurizer.features(texts)

    def route_texts(self, texts: Sequence[str], *, base: str | None = None) -> Gates:
        """Gates for `texts` over the cards made for base model `base` (None: all)."""
        return self.route(self.features(texts), mask=None if base is None else self.for_base(base))

    def for_base(self, base: str) -> set[str]:
        """Digests of the indexed cards that say they were made for base model `base`.

        A card that names no base is never chosen by itself, only by name: nothing says yet that it fits.
        """
        entries = list(self._entries.items())
        return {digest for digest, entry in entries if entry.base_name is not None and same_base(entry.base_name, base)}

    def route(self, features: Features, *, mask: Collection[str] | None = None) -> Gates:
        """Gates with one row per row of `features`. Raises `RoutingError` for features of another embedder."""
        if features.embedder != self._featurizer.embedder:
            raise RoutingError(f"expected features by {self._featurizer.embedder}, got them by {features.embedder}")
        with self._lock:
            keys = [digest for digest in self._entries if mask is None or digest in mask]
            entries = {digest: self._entries[digest] for digest in keys}
            scores = self._index.score(features.vectors, keys) if keys else None
        if scores is None:
            nothing = Decision(mode=self.mode, why="no card is known for this base model", abstained=True)
            return Gates.of([{}] * len(features), {}, [nothing] * len(features))
        ranked = [
            self._ranked(entries, keys, values, nearest)
            for values, nearest in zip(scores.values, scores.nearest, strict=True)
        ]
        decided = [self._decide(candidates) for candidates in ranked]
        names = {digest: entry.name for digest, entry in entries.items()}
        return Gates.of([row for row, _ in decided], names, [decision for _, decision in decided])

    @property
    def mode(self) -> str:
        """Name of the way adapters are chosen."""
        return f"top{self.top_k}"

    def _register(self, card: Describable, *, virtual: bool, source: str | None) -> None:
        words = tuple(dict.fromkeys(text for text in (card.description, *card.examples) if text.strip()))
        prototypes = words or (card.name.replace("-", " ").replace("_", " "),)
        vectors = self.features(prototypes).vectors
        entry = _Entry(name=card.name, base_name=card.base_name, prototypes=prototypes, virtual=virtual, source=source)
        with self._lock:
            self._index.add(card.digest, vectors)
            self._entries[card.digest] = entry

    def _ranked(
        self, entries: dict[str, _Entry], keys: Sequence[str], values: Vectors, nearest: Iterable[int]
    ) -> list[Candidate]:
        """All candidates of one row, best first; equal scores by digest, so that every node decides alike."""
        candidates = [
            Candidate(
                digest=digest,
                name=entries[digest].name,
                score=float(score),
                nearest=entries[digest].prototypes[at],
                virtual=entries[digest].virtual,
                source=entries[digest].source,
            )
            for digest, score, at in zip(keys, values, nearest, strict=True)
        ]
        return sorted(candidates, key=lambda candidate: (-candidate.score, candidate.digest))

    def _decide(self, candidates: Sequence[Candidate]) -> tuple[dict[str, float], Decision]:
        chosen = [candidate for candidate in candidates[: self.top_k] if candidate.score >= self.threshold]
        decision = Decision(
            mode=self.mode,
            why=_reason(chosen, candidates[0], self.threshold),
            abstained=not chosen,
            threshold=self.threshold,
            candidates=tuple(candidates[:SHOWN_CANDIDATES]),
        )
        return dict(zip((candidate.digest for candidate in chosen), self._weights(chosen), strict=True)), decision

    def _weights(self, chosen: Sequence[Candidate]) -> list[float]:
        """Softmax of the scores over the temperature; one alone has weight 1."""
        if not chosen:
            return []
        exponents = np.array([candidate.score for candidate in chosen]) / self.temperature
        weights = np.exp(exponents - exponents.max())
        return [float(weight) for weight in weights / weights.sum()]


def _reason(chosen: Sequence[Candidate], best: Candidate, threshold: float) -> str:
    if not chosen:
        return f"no card fits: the nearest, {best.name}, scores {best.score:.2f} where {threshold:.2f} is asked"
    parts = ", ".join(f"{candidate.name} {candidate.score:.2f}" for candidate in chosen)
    return f"{parts} (asked {threshold:.2f}): it is near “{chosen[0].nearest}”"
