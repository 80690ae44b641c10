"""A router evaluated from outside: its decisions on labelled prompts become the figures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from arrowmoe.errors import RoutingError
from arrowmoe.routing import LoRARouter, Policy
from arrowmoe.routing.evaluation import score_router
from tests.arrowmoe.routing import topics
from tests.arrowmoe.routing.topics import Card


@dataclass(frozen=True, kw_only=True)
class Prompt:
    text: str
    card: str | None


def router(*cards: Card) -> LoRARouter:
    """Only a card's own examples are near enough."""
    routes = topics.router(Policy(threshold=0.999))
    for card in cards:
        routes.register_card(card)
    return routes


EAST = Card(digest="d0", name="east", examples=("east 1", "east 2", "east 3"))
NORTH = Card(digest="d1", name="north", examples=("north 1", "north 2", "north 3"))
PROMPTS = [
    Prompt(text="east 1", card="east"),
    Prompt(text="north 1", card="north"),
    Prompt(text="north 2", card="east"),
    Prompt(text="north 77", card="north"),
    Prompt(text="south 1", card=None),
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
    newer = Card(digest="d2", name="east", examples=("north 2",))
    foreign = Card(digest="d3", name="foreign", examples=("north 77",), base_name="other")
    found = score_router(router(EAST, NORTH, newer, foreign), PROMPTS, base="base")
    assert found.names == ("east", "north")
    assert found.confusion[1:] == ((0, 1, 1), (0, 0, 1))
    assert sum(found.confusion[0]) == 2


def test_nothing_to_evaluate_is_refused() -> None:
    with pytest.raises(RoutingError, match="labelled prompts"):
        score_router(router(EAST), [])
    with pytest.raises(RoutingError, match="no card is known") as refused:
        score_router(router(), PROMPTS)
    assert refused.value.hint
