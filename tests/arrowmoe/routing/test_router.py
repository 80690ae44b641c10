"""The router over statistics and words: acceptance, modes, masks, opinions, coming and going, virtual candidates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrowmoe.errors import GateError, RoutingError
from arrowmoe.features import Features, TextFeaturizer
from arrowmoe.routing import Gates, LoRARouter, Opinion, Policy
from tests.arrowmoe.routing.topics import TOPICS, Card, Topics, prompts, router, statistics


@pytest.fixture
def routes() -> LoRARouter:
    """east and north by statistics, west by its words and for another base."""
    made = router()
    made.register_card(Card(digest="d0", name="east"), statistics(made, "east"))
    made.register_card(Card(digest="d1", name="north"), statistics(made, "north"))
    made.register_card(Card(digest="d2", name="west", examples=("west 1", "west 2"), base_name="other"))
    return made


def test_prompts_go_to_the_card_they_are_for(routes: LoRARouter) -> None:
    for topic in ("east", "north", "west"):
        gates = routes.route_texts(prompts(topic, 20, first=500))
        chosen = [gates.attribution(row) for row in range(20)]
        assert sum(one == {topic: 1.0} for one in chosen) >= 17
        assert all(one in ({topic: 1.0}, {}) for one in chosen)


def test_what_fits_nothing_abstains_and_says_what_was_asked(routes: LoRARouter) -> None:
    gates = routes.route_texts(["south 3", "something else"])
    for decision in gates.decisions:
        assert decision.abstained
        assert "no card fits: the nearest," in decision.why
        assert decision.candidates, "the candidates are shown all the same"
    assert gates.adapters == ()


def test_it_says_by_what_a_card_was_judged(routes: LoRARouter) -> None:
    east, west = routes.route_texts(["east 7", "west 7"]).decisions
    assert (east.candidates[0].evidence, west.candidates[0].evidence) == ("statistics", "examples")
    assert east.p_value == east.candidates[0].p_value
    assert east.p_value is not None
    assert "prototype" in east.candidates[0].nearest
    assert (west.p_value, west.candidates[0].nearest) in ((None, "west 1"), (None, "west 2"))


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5])
def test_a_card_refuses_the_share_of_its_own_prompts_that_was_asked(routes: LoRARouter, alpha: float) -> None:
    gates = routes.route(routes.features(prompts("north", 600, first=50_000)), mask={"d1"}, policy=Policy(alpha=alpha))
    refused = np.mean([decision.abstained for decision in gates.decisions])
    # 200 calibration prompts and 600 asked: five standard deviations of both.
    assert abs(refused - alpha) < 5 * np.sqrt(alpha * (1 - alpha) * (1 / 200 + 1 / 600))


def test_p_values_do_not_depend_on_who_else_is_there(routes: LoRARouter) -> None:
    before = [one.p_value for one in routes.route_texts(prompts("east", 9), base="base").decisions]
    routes.unregister("d1")
    routes.register_card(Card(digest="d9", name="south"), statistics(routes, "south"))
    assert [one.p_value for one in routes.route_texts(prompts("east", 9), base="base").decisions] == before


def test_too_few_calibration_prompts_for_alpha_leave_the_words_threshold() -> None:
    made = router(Policy(alpha=0.001))
    made.register_card(Card(digest="d0", name="east"), statistics(made, "east"))
    inside, outside = made.route_texts(["east 7", "south 7"]).decisions
    assert (inside.p_value, outside.p_value) == (None, None)
    assert (inside.abstained, outside.abstained) == (False, True)


def test_no_cards_at_all_abstains() -> None:
    gates = router().route_texts(["east 0", "x"])
    assert gates.adapters == ()
    assert all(decision.abstained for decision in gates.decisions)


def test_soft_weights_are_the_softmax_of_the_scores(routes: LoRARouter) -> None:
    policy = Policy(mode="soft", temperature=20.0, alpha=0.0)
    gates = routes.route(routes.features(["east 7"]), mask={"d0", "d1"}, policy=policy)
    scores = np.array([candidate.score for candidate in gates.decisions[0].candidates])
    expected = np.exp((scores - scores.max()) / 20.0)
    found = [gates.attribution(0).get(candidate.name, 0.0) for candidate in gates.decisions[0].candidates]
    np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-6)


@pytest.mark.parametrize("mode", ["top2", "soft", "threshold"])
def test_no_mode_uses_a_card_that_refuses(routes: LoRARouter, mode: str) -> None:
    policy = Policy(mode=mode, temperature=1000.0)
    gates = routes.route(routes.features(["east 7"]), mask={"d0", "d1"}, policy=policy)
    assert gates.attribution(0) == {"east": 1.0}


def test_only_cards_of_the_base_are_chosen(routes: LoRARouter) -> None:
    assert routes.route_texts(["west 1"], base="base").decisions[0].abstained
    assert routes.route_texts(["west 1"], base="hub/Other").attribution(0) == {"west": 1.0}


def test_a_card_without_a_base_is_never_chosen_for_one(routes: LoRARouter) -> None:
    routes.register_card(Card(digest="d7", name="nowhere", examples=("south 1",), base_name=None))
    assert routes.route_texts(["south 1"], base="base").decisions[0].abstained
    assert routes.route_texts(["south 1"]).attribution(0) == {"nowhere": 1.0}


def test_a_mask_leaves_cards_out(routes: LoRARouter) -> None:
    gates = routes.route(routes.features(["east 1"]), mask={"d1"})
    assert {candidate.name for candidate in gates.decisions[0].candidates} == {"north"}


def test_a_card_that_left_is_not_chosen_and_may_come_back(routes: LoRARouter) -> None:
    assert routes.unregister("d0")
    assert not routes.unregister("d0")
    assert routes.route_texts(["east 1"]).decisions[0].abstained
    routes.register_card(Card(digest="d0", name="east", examples=("east 1",)))
    assert routes.route_texts(["east 1"]).attribution(0) == {"east": 1.0}


def test_a_virtual_candidate_is_chosen_and_named_and_becomes_real(routes: LoRARouter) -> None:
    far = Card(digest="d9", name="south")
    routes.register_virtual_candidate(far, "node-b", statistics(routes, "south"))
    (decision,) = routes.route_texts(["south 7"]).decisions
    best = decision.candidates[0]
    assert (best.name, best.evidence, best.virtual, best.source) == ("south", "statistics", True, "node-b")
    routes.register_card(far)
    assert not routes.is_virtual("d9")
    routes.register_virtual_candidate(far, source="node-b")
    assert not routes.is_virtual("d9"), "a card that is here stays real"


def test_equal_scores_are_decided_by_digest() -> None:
    made = router()
    for digest in ("d7", "d3", "d5"):
        made.register_card(Card(digest=digest, name=digest, examples=("east 4",)))
    assert made.route_texts(["east 4"]).adapters == ("d3",)


def test_a_card_without_words_is_known_by_its_name() -> None:
    made = router()
    made.register_card(Card(digest="d1", name="east-4"))
    gates = made.route_texts(["east 4"])
    assert gates.attribution(0) == {"east-4": 1.0}
    assert gates.decisions[0].candidates[0].evidence == "name"


def test_statistics_of_another_space_give_way_to_the_words() -> None:
    made = router()
    other = LoRARouter(TextFeaturizer(Topics(name="another")))
    made.register_card(Card(digest="d1", name="east", examples=("east 1",)), statistics(other, "east"))
    same_name = replace(statistics(made, "north"), check=(9.0,) * 16)
    made.register_card(Card(digest="d2", name="north", description="north 1"), same_name)
    assert [profile.evidence for profile in made.profiles().values()] == ["examples", "description"]


def test_features_of_another_embedder_are_refused(routes: LoRARouter) -> None:
    features = Features(texts=("x",), vectors=np.ones((1, 24), dtype=np.float32), embedder="other")
    with pytest.raises(RoutingError, match="topics"):
        routes.route(features)


def test_a_prior_moves_the_score_by_its_log_odds(routes: LoRARouter) -> None:
    features = routes.features(["east 7"])
    plain = {one.name: one.score for one in routes.route(features, mask={"d0", "d1"}).decisions[0].candidates}
    heard = routes.route(features, mask={"d0", "d1"}, opinions=[Opinion(card="north", confidence=0.8)]).decisions[0]
    found = {one.name: one.score for one in heard.candidates}
    assert found["north"] - plain["north"] == pytest.approx(np.log(0.8 / 0.2))
    assert found["east"] == plain["east"]
    assert "prior" in heard.why


def test_an_override_is_used_where_the_card_accepts(routes: LoRARouter) -> None:
    gates = routes.route(routes.features(["east 7"]), opinions=[Opinion(card="east", use="override")])
    assert (gates.attribution(0), gates.decisions[0].mode) == ({"east": 1.0}, "override")


def test_an_override_that_does_not_fit_is_vetoed_and_the_routers_own_two_best_are_used(routes: LoRARouter) -> None:
    gates = routes.route(routes.features(["east 7"]), opinions=[Opinion(card="north", use="override")])
    assert (gates.attribution(0), gates.decisions[0].mode) == ({"east": 1.0}, "top2")
    assert "vetoed" in gates.decisions[0].why


def test_opinions_and_policies_that_mean_nothing_are_refused(routes: LoRARouter) -> None:
    with pytest.raises(RoutingError, match="east, north, west"):
        routes.route(routes.features(["x"]), opinions=[Opinion(card="nobody")])
    with pytest.raises(RoutingError, match="one opinion per row"):
        routes.route(routes.features(["x"]), opinions=[None, None])
    with pytest.raises(RoutingError, match="confidence"):
        Opinion(card="east", confidence=1.0)
    for wrong in ({"mode": "manual"}, {"mode": "best"}, {"alpha": 1.0}, {"temperature": 0.0}, {"max_experts": 9}):
        with pytest.raises(RoutingError, match="expected"):
            Policy(**wrong)


@given(st.lists(st.tuples(st.sampled_from(TOPICS), st.booleans()), max_size=12))
def test_any_history_of_arrivals_and_departures_routes_like_a_fresh_router(history: list[tuple[str, bool]]) -> None:
    lived, alive = router(), {}
    for topic, leaves in history:
        if leaves:
            assert lived.unregister(topic) == (alive.pop(topic, None) is not None)
        else:
            alive[topic] = Card(digest=topic, name=topic, examples=tuple(prompts(topic, 3)))
            lived.register_card(alive[topic])
    fresh = router()
    for card in alive.values():
        fresh.register_card(card)
    texts = [f"{topic} 99" for topic in TOPICS]
    for one, other in zip(lived.route_texts(texts).decisions, fresh.route_texts(texts).decisions, strict=True):
        assert [c.name for c in one.candidates] == [c.name for c in other.candidates]
        assert [c.score for c in one.candidates] == pytest.approx([c.score for c in other.candidates], rel=1e-6)


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
