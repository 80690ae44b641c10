"""A card as the router knows it: its statistics, from itself or made here of the words it shows, and what that says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from arrowmoe.features import Featurizer
from arrowmoe.routing.acceptance import Acceptance
from arrowmoe.routing.densities import Array
from arrowmoe.routing.probe import Probe
from arrowmoe.routing.statistics import CardStatistics, summarise
from arrowmoe.routing.texts import phrases
from registry.logs import get_logger
from registry.manifest import MAX_STATISTICS_BYTES

Evidence = Literal["statistics", "examples", "description", "name"]
MAX_EXAMPLES = 64
log = get_logger(__name__)


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


@dataclass(kw_only=True, eq=False)
class Profile:
    """One indexed card. `texts` name its prototypes where they are words that it shows; () where they are means."""

    name: str
    base_name: str | None
    evidence: Evidence
    statistics: CardStatistics
    texts: tuple[str, ...] = ()
    virtual: bool = False
    source: str | None = None
    _acceptance: Acceptance | None = field(default=None, repr=False)

    def p_values(self, x: Array, probe: Probe, alpha: float) -> Array | None:
        """P-values (n,) of rows `x` among this card's prompts.

        None for a card with so few calibration prompts that no p-value could be below `alpha`, and nothing be refused.
        """
        prompts = self.statistics.calibrated
        if not prompts or 0 < alpha < 1 / (prompts + 1):
            return None
        if self._acceptance is None:
            self._acceptance = Acceptance(self.statistics, probe)
        return self._acceptance.p_values(x)

    def cosines(self, x: Array) -> Array:
        """Cosine (n,) of each row with the nearest prototype."""
        prototypes = self.statistics.prototypes
        norms = np.maximum(np.linalg.norm(prototypes, axis=1), 1e-12)
        return np.asarray((x @ (prototypes / norms[:, None]).T).max(axis=1))

    def prototype(self, index: int) -> str:
        """What to call a prototype."""
        if self.texts:
            return self.texts[index]
        counts = self.statistics.counts
        return f"prototype {index + 1} of {len(counts)}, {counts[index]:.0f} prompts"


def profile_of(
    card: Describable,
    statistics: CardStatistics | None,
    *,
    featurizer: Featurizer,
    probe: Probe,
    virtual: bool = False,
    source: str | None = None,
) -> Profile:
    """Profile of a card by its statistics, if they are of this space, else by its examples, description, or name."""
    evidence: Evidence = "statistics"
    texts: tuple[str, ...] = ()
    if statistics is None or not _fits(card, statistics, probe):
        evidence, statistics, texts = _from_words(card, featurizer, probe)
    return Profile(
        name=card.name,
        base_name=card.base_name,
        evidence=evidence,
        statistics=statistics,
        texts=texts,
        virtual=virtual,
        source=source,
    )


def _fits(card: Describable, statistics: CardStatistics, probe: Probe) -> bool:
    """Whether statistics were made in this node's space; if not, that is said, and the card's words are used."""
    expected, got = (probe.embedder, probe.digest), (statistics.embedder, statistics.probe)
    same = expected == got and statistics.dimension == len(probe.mean) and probe.is_same_space(statistics.check)
    if not same:
        log.warning("statistics_of_another_space", card=card.name, expected=expected[0], got=got[0])
    return same


def _from_words(
    card: Describable, featurizer: Featurizer, probe: Probe
) -> tuple[Evidence, CardStatistics, tuple[str, ...]]:
    examples = tuple(dict.fromkeys(text for text in card.examples if text.strip()))[:MAX_EXAMPLES]
    said = tuple(text for text in phrases(card.description) if text not in examples)
    words = (*examples, *said) or (card.name.replace("-", " ").replace("_", " "),)
    vectors = featurizer.features(words).vectors
    made = summarise(
        vectors[: len(examples)],
        embedder=probe.embedder,
        probe=probe.digest,
        check=probe.check,
        public=vectors[len(examples) :],
        min_prompts=1,
        budget_bytes=_ROOM,
    )
    return "examples" if examples else "description" if said else "name", made, words


_ROOM = 64 * MAX_STATISTICS_BYTES
"""These statistics travel nowhere, so they may be as large as a card's words are many."""

__all__ = ["Describable", "Evidence", "Profile", "profile_of"]
