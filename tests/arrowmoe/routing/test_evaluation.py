"""A router evaluated from outside: its decisions on labelled prompts become the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from arrowmoe.errors import RoutingError
from arrowmoe.features import TextFeaturizer
from arrowmoe.routing import LoRARouter
from arrowmoe.routing.evaluation import score_router


@dataclass(frozen=True, kw_only=True)
class Card:
    digest: str
    name: str
    description: str
    base_name: str = "base"
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Prompt:
    text: str
    card: str | None


class Angles:
    """An embedder whose texts are angles in degrees."""

    name = "angles"

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        radians = np.deg2rad([float(text) for text in texts])
        return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def router(*cards: Card) -> LoRARouter:
    routes = LoRARouter(TextFeaturizer(Angles()), threshold=0.5)
    for card in cards:
        routes.register_card(card)
    return routes


EAST, NORTH = Card(digest="d0", name="east", description="0"), Card(digest="d1", name="north", description="90")
PROMPTS = [
    Prompt(text="10", card="east"),
    Prompt(text="80", card="north"),
    Prompt(text="50", card="east"),
    Prompt(text="160", card="north"),
    Prompt(text="225", card=None),
]


def test_decisions_become_figures() -> None:
    found = score_router(router(EAST, NORTH), PROMPTS)
    assert found.names == ("east", "north")
    assert found.confusion == ((1, 1, 0), (0, 1, 1), (0, 0, 1))
    assert found.accuracy is not None
    assert found.accuracy.value == 0.75, "what abstained has a best card all the same"
    assert found.routed_accuracy is not None
    assert found.routed_accuracy.value == 0.5
    assert found.auroc == 1.0
    assert found.coverage == (), "this router gives no p-values"
    assert found.seconds_per_decision is not None


def test_many_prompts_are_routed_in_batches_with_the_same_figures() -> None:
    once, often = score_router(router(EAST, NORTH), PROMPTS), score_router(router(EAST, NORTH), PROMPTS * 100)
    assert often.rows == 500
    assert np.array_equal(np.array(often.confusion), 100 * np.array(once.confusion))


def test_only_cards_of_the_base_are_chosen_and_versions_of_a_name_are_one() -> None:
    newer = Card(digest="d2", name="east", description="50")
    foreign = Card(digest="d3", name="foreign", description="80", base_name="other")
    found = score_router(router(EAST, NORTH, newer, foreign), PROMPTS, base="base")
    assert found.names == ("east", "north")
    assert found.confusion == ((2, 0, 0), (0, 1, 1), (0, 0, 1))


def test_nothing_to_evaluate_is_refused() -> None:
    with pytest.raises(RoutingError, match="labelled prompts"):
        score_router(router(EAST), [])
    with pytest.raises(RoutingError, match="no card is known") as refused:
        score_router(router(), PROMPTS)
    assert refused.value.hint
