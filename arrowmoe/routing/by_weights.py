"""Cards that say nothing of what they are for, judged by what their weights do to a prompt on one engine's base."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from arrowmoe.base_model import BaseModel
from arrowmoe.errors import EngineError
from arrowmoe.routing.gates import Gates
from arrowmoe.routing.probe import sentences
from arrowmoe.routing.spectral import SpectralScorer
from registry.card import LoRACard
from registry.logs import get_logger

PROBE_TEXTS = 64
log = get_logger(__name__)


class Host(Protocol):
    """What is needed of an engine."""

    @property
    def base(self) -> BaseModel:
        """The base model, with the adapters it holds."""

    def computing(self, gates: Gates) -> AbstractContextManager[None]:
        """Be the only one to run forward passes, with `gates`."""


class ByWeights:
    """Spectral scores on one engine's bare base; a score is a z-score over the probe's sentences."""

    def __init__(self, engine: Host) -> None:
        self._engine = engine
        with self._bare():
            self._scorer = SpectralScorer(engine.base, [], sentences()[:PROBE_TEXTS])

    def keep(self, cards: Sequence[LoRACard]) -> None:
        """Judge these cards and no others; one whose weights cannot be read so is logged and left out."""
        wanted = {card.digest: card for card in cards}
        for digest in set(self._scorer.digests) - wanted.keys():
            self._scorer.remove(digest)
        for digest in wanted.keys() - set(self._scorer.digests):
            try:
                with self._bare():
                    self._scorer.add(wanted[digest])
            except EngineError as error:
                log.warning("card_not_judged_by_weights", card=wanted[digest].name, error=str(error))

    def best(self, text: str, mask: Collection[str] | None) -> tuple[str, float] | None:
        """The card, among those in `mask`, that would move `text` furthest for its habit, and its z-score."""
        columns = [at for at, digest in enumerate(self._scorer.digests) if mask is None or digest in mask]
        if not columns:
            return None
        with self._bare():
            scores = self._scorer.scores([text])[0]
        best = max(columns, key=lambda at: float(scores[at]))
        return self._scorer.digests[best], float(scores[best])

    def _bare(self) -> AbstractContextManager[None]:
        return self._engine.computing(Gates.of([], {}))


__all__ = ["ByWeights"]
