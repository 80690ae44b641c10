"""Evaluating a router on labelled prompts: it routes them as it would a request; `metrics` makes the figures."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Final, Protocol

import numpy as np

from arrowmoe.errors import RoutingError
from arrowmoe.features import Features
from arrowmoe.routing.gates import Gates
from arrowmoe.routing.metrics import NOBODY, Floats, RoutingEvaluation, evaluate

BATCH_ROWS: Final = 256


class LabelledPrompt(Protocol):
    """A prompt and the name of the card that it is for; None if no card is."""

    @property
    def text(self) -> str:
        """The prompt."""

    @property
    def card(self) -> str | None:
        """The right card's name."""


class TextRouter(Protocol):
    """A router that makes its own features; its decisions carry their candidates, best first."""

    def features(self, texts: Sequence[str]) -> Features:
        """Features of `texts`."""

    def route(self, features: Features, *, mask: Collection[str] | None = None) -> Gates:
        """Gates with one row per row of `features`."""

    def for_base(self, base: str) -> set[str]:
        """Digests of the cards made for base model `base`."""


def score_router(
    router: TextRouter, examples: Sequence[LabelledPrompt], *, base: str | None = None
) -> RoutingEvaluation:
    """Route `examples` over the cards for `base` (None: all) and evaluate; time is that of deciding, not embedding.

    The cards are those that examples or decisions name; versions of one name count as one. Raises `RoutingError` if
    there is no example, or no card to choose from.
    """
    if not examples:
        raise RoutingError("expected labelled prompts to evaluate on, got none")
    mask = None if base is None else router.for_base(base)
    batches, seconds = [], 0.0
    for start in range(0, len(examples), BATCH_ROWS):
        features = router.features([example.text for example in examples[start : start + BATCH_ROWS]])
        begin = time.perf_counter()
        batches.append(router.route(features, mask=mask))
        seconds += time.perf_counter() - begin
    return _evaluated(batches, [example.card for example in examples], seconds)


def _evaluated(batches: Sequence[Gates], cards: Sequence[str | None], seconds: float) -> RoutingEvaluation:
    decisions = [decision for gates in batches for decision in gates.decisions]
    if len(decisions) != len(cards) or not all(decision.candidates for decision in decisions):
        hint = "register at least one card that fits the base model"
        raise RoutingError("expected candidates for each prompt, got a prompt without: no card is known", hint=hint)
    firsts = [decision.candidates[0] for decision in decisions]
    names = sorted(
        {card for card in cards if card is not None}
        | {first.name for first in firsts}
        | {name for gates in batches for name in gates.names}
    )
    column = {name: index for index, name in enumerate(names)}
    p_values = [decision.p_value for decision in decisions if decision.p_value is not None]
    return evaluate(
        names,
        np.concatenate([_by_name(gates, column) for gates in batches]),
        [first.score for first in firsts],
        p_values if len(p_values) == len(cards) else None,
        [NOBODY if card is None else column[card] for card in cards],
        best=[column[first.name] for first in firsts],
        seconds=seconds,
    )


def _by_name(gates: Gates, column: dict[str, int]) -> Floats:
    """Weights (rows, names): the gates of cards that share a name are added."""
    weights = np.zeros((len(gates), len(column)))
    for index, name in enumerate(gates.names):
        weights[:, column[name]] += gates.weights[:, index]
    return weights
