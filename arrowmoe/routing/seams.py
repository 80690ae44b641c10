"""What the engine asks of a router, and whom it tells of what was routed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from arrowmoe.routing.gates import Decision, Gates
from arrowmoe.routing.statistics import CardStatistics
from registry.entries import CardEntry

if TYPE_CHECKING:
    from arrowmoe.generation import Generation


class TextRouter(Protocol):
    """What the engine asks for `adapter="auto"`."""

    def route_texts(self, texts: Sequence[str], *, base: str) -> Gates:
        """Gates with one row per text, over the cards made for base model `base`."""

    def register_card(self, card: CardEntry, statistics: CardStatistics | None = None) -> None:
        """A card arrived that may be chosen from now on."""


class Observer(Protocol):
    """What is told of every routed request (`arrowmoe.signalling`)."""

    def saw(self, base: str, text: str, decision: Decision, generation: Generation | None) -> str | None:
        """An id that feedback may refer to; None where the request was not kept."""


__all__ = ["Observer", "TextRouter"]
