"""The router on vectors chosen by hand: cosine, threshold, top-k, masks, coming and going, virtual candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrowmoe.errors import GateError, RoutingError
from arrowmoe.features import Features, TextFeaturizer
from arrowmoe.routing import Gates, LoRARouter
from arrowmoe.routing.index import PrototypeIndex


@dataclass(frozen=True, kw_only=True)
class Card:
    digest: str
    name: str = "card"
    base_name: str | None = "base"
    description: str = ""
    examples: tuple[str, ...] = ()


class Angles:
    """An embedder whose texts are angles in degrees."""

    name = "angles"

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        radians = np.deg2rad([float(text) for text in texts])
        return 3 * np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def router(**settings: object) -> LoRARouter:
    routes = LoRARouter(TextFeaturizer(Angles()), **{"threshold": 0.5, **settings})
    routes.register_card(Card(digest="d0", name="east", description="0", examples=("20",)))
    routes.register_card(Card(digest="d1", name="north", description="90"))
    routes.register_card(Card(digest="d2", name="west", description="180", base_name="other"))
    return routes


def test_the_nearest_prototype_decides() -> None:
    gates = router().route_texts(["30", "80", "250"])
    assert [gates.attribution(row) for row in range(3)] == [{"east": 1.0}, {"north": 1.0}, {}]
    best = gates.decisions[0].candidates[0]
    assert (best.name, best.nearest) == ("east", "20")
    assert best.score == pytest.approx(np.cos(np.deg2rad(10)))


def test_what_fits_nothing_abstains_and_says_why() -> None:
    (decision,) = router().route_texts(["270"]).decisions
    assert decision.abstained
    assert "no card fits" in decision.why
    assert decision.candidates, "the candidates are shown all the same"


def test_no_cards_at_all_abstains() -> None:
    gates = LoRARouter(TextFeaturizer(Angles())).route_texts(["0", "1"])
    assert gates.adapters == ()
    assert all(decision.abstained for decision in gates.decisions)


def test_top_k_weights_are_the_softmax_of_the_scores() -> None:
    gates = router(top_k=2, temperature=0.25).route_texts(["50"])
    scores = np.cos(np.deg2rad([30, 40]))
    expected = np.exp(scores / 0.25) / np.exp(scores / 0.25).sum()
    found = gates.attribution(0)
    assert found == pytest.approx({"east": expected[0], "north": expected[1]})


def test_top_k_never_takes_a_card_below_the_threshold() -> None:
    assert router(top_k=3).route_texts(["0"]).attribution(0) == {"east": 1.0}


def test_only_cards_of_the_base_are_chosen() -> None:
    routes = router()
    assert routes.route_texts(["180"], base="base").decisions[0].abstained
    assert routes.route_texts(["180"], base="hub/Other").attribution(0) == {"west": 1.0}


def test_a_card_without_a_base_is_never_chosen_for_one() -> None:
    routes = router()
    routes.register_card(Card(digest="d7", name="nowhere", description="270", base_name=None))
    assert routes.route_texts(["270"], base="base").decisions[0].abstained
    assert routes.route_texts(["270"]).attribution(0) == {"nowhere": 1.0}


def test_a_mask_leaves_cards_out() -> None:
    routes = router()
    gates = routes.route(routes.features(["10"]), mask={"d1"})
    assert {candidate.name for candidate in gates.decisions[0].candidates} == {"north"}


def test_a_card_that_left_is_not_chosen_and_may_come_back() -> None:
    routes = router()
    assert routes.unregister("d0")
    assert not routes.unregister("d0")
    assert routes.route_texts(["10"]).decisions[0].abstained
    routes.register_card(Card(digest="d0", name="east", description="10"))
    assert routes.route_texts(["10"]).attribution(0) == {"east": 1.0}


def test_a_virtual_candidate_is_chosen_and_named_and_becomes_real() -> None:
    routes = router()
    far = Card(digest="d9", name="south", description="270")
    routes.register_virtual_candidate(far, source="node-b")
    (decision,) = routes.route_texts(["260"]).decisions
    assert (decision.candidates[0].virtual, decision.candidates[0].source) == (True, "node-b")
    routes.register_card(far)
    assert not routes.is_virtual("d9")
    routes.register_virtual_candidate(far, source="node-b")
    assert not routes.is_virtual("d9"), "a card that is here stays real"


def test_equal_scores_are_decided_by_digest() -> None:
    routes = LoRARouter(TextFeaturizer(Angles()), threshold=0.5)
    for digest in ("d7", "d3", "d5"):
        routes.register_card(Card(digest=digest, name=digest, description="45"))
    assert routes.route_texts(["45"]).adapters == ("d3",)


def test_a_card_without_words_is_known_by_its_name() -> None:
    routes = LoRARouter(TextFeaturizer(Angles()), threshold=0.5)
    routes.register_card(Card(digest="d1", name="45"))
    assert routes.route_texts(["40"]).attribution(0) == {"45": 1.0}


def test_features_of_another_embedder_are_refused() -> None:
    features = Features(texts=("x",), vectors=np.ones((1, 2), dtype=np.float32), embedder="other")
    with pytest.raises(RoutingError, match="angles"):
        router().route(features)


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 5), st.booleans()), max_size=60), st.integers(0, 99)
)
def test_any_history_of_arrivals_and_departures_scores_like_a_fresh_index(history: list, seed: int) -> None:
    random = np.random.default_rng(seed)
    index, alive = PrototypeIndex(), {}
    for key, count, leaves in history:
        if leaves:
            assert index.remove(key) == (alive.pop(key, None) is not None)
        else:
            alive[key] = unit(random, count)
            index.add(key, alive[key])
    assert len(index) == len(alive)
    if alive:
        queries = unit(random, 3)
        found = index.score(queries, list(alive))
        expected = np.stack([(queries @ prototypes.T).max(axis=1) for prototypes in alive.values()], axis=1)
        np.testing.assert_allclose(found.values, expected, atol=1e-6)


def unit(random: np.random.Generator, count: int) -> np.ndarray:
    vectors = random.standard_normal((count, 4)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_gates_of_a_subset_drop_what_it_does_not_use() -> None:
    gates = Gates.of([{"a": 1.0}, {"b": 0.5, "c": 0.5}, {}], {"a": "A", "b": "B", "c": "C"})
    subset = gates.rows([2, 1])
    assert subset.adapters == ("b", "c")
    assert subset.weights.tolist() == [[0.0, 0.0], [0.5, 0.5]]


def test_two_cards_of_one_name_are_told_apart() -> None:
    gates = Gates.of(
        [{"blake3:aaaaaaaaaa": 0.5, "blake3:bbbbbbbbbb": 0.5}], {"blake3:aaaaaaaaaa": "x", "blake3:bbbbbbbbbb": "x"}
    )
    assert set(gates.attribution(0)) == {"x (blake3:aaaaaaaa)", "x (blake3:bbbbbbbb)"}


@pytest.mark.parametrize("weights", [np.ones((2, 3)), np.ones(2), np.full((2, 1), np.inf)])
def test_weights_that_do_not_fit_are_refused(weights: np.ndarray) -> None:
    with pytest.raises(GateError):
        Gates(adapters=("a",), names=("A",), weights=weights.astype(np.float32))
