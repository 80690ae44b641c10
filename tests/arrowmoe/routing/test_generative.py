"""The generative router: trained for real on a tiny base, it names cards, abstains, obeys masks, and shares the base.

Probabilities are held against PEFT's own view of the router's adapter, one plain forward pass per name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from arrowmoe.engine import ArrowEngine
from arrowmoe.errors import AdapterMismatchError, RoutingError
from arrowmoe.routing.dataset import RoutingExample, routing_prompt
from arrowmoe.routing.generative import GenerativeRouter, extend, routes_of, train_router_lora
from evolution.fine_tuning import FineTuning
from registry.card import LoRACard
from tests.arrowmoe import tiny
from tests.peft_models import load_peft, sample_inputs, tiny_llama

# The tiny tokenizer knows the words w3 … w63 only, so cards are called so, and "none" is its unknown word.
TEXTS = {"w60": ("w3", "w4", "w5"), "w61": ("w13", "w14", "w15"), "w62": ("w23", "w24", "w25"), None: ("w33", "w34")}
TUNING = FineTuning(steps=100, learning_rate=2e-2)
END = 1


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a catalog says of a card."""

    digest: str
    name: str
    base_name: str | None = "tiny"
    description: str = ""
    examples: Sequence[str] = ()


def examples(*cards: str | None) -> list[RoutingExample]:
    return [RoutingExample(text=text, card=card) for card in cards for text in TEXTS[card]]


@torch.inference_mode()
def plain_probs(model: PreTrainedModel, text: str, listed: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """P(name | one of `names`) by one forward pass per name, of one token each."""
    tokenizer = tiny.tokenizer()
    said = routing_prompt(text, listed)
    prompt = list(tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)["input_ids"])
    scores = []
    for name in names:
        (token,) = tokenizer(name)["input_ids"]
        log_probs = model(input_ids=torch.tensor([[*prompt, token]])).logits[0].log_softmax(dim=-1)
        scores.append(log_probs[-2, token] + log_probs[-1, END])
    return dict(zip(names, torch.stack(scores).softmax(dim=0).tolist(), strict=True))


@pytest.fixture(scope="module")
def trained() -> LoRACard:
    return train_router_lora(tiny.base(tiny_llama()), examples("w60", "w61", None), TUNING)


@pytest.fixture(scope="module")
def without_none() -> LoRACard:
    return train_router_lora(tiny.base(tiny_llama()), examples("w60", "w61", "w62"), TUNING)


@pytest.fixture
def engine() -> ArrowEngine:
    return tiny.llama_engine()


def router_on(engine: ArrowEngine, card: LoRACard, names: Sequence[str], threshold: float = 0.5) -> GenerativeRouter:
    router = GenerativeRouter(engine, card, threshold=threshold)
    for name in names:
        router.register_card(Described(digest=f"digest of {name}", name=name))
    return router


def test_it_names_the_card_it_was_shown_and_abstains_where_it_was_shown_none(
    engine: ArrowEngine, trained: LoRACard
) -> None:
    rows = examples("w61", None, "w60")
    gates = router_on(engine, trained, ["w60", "w61"]).route_texts([row.text for row in rows])
    named = [next(iter(gates.attribution(row)), None) for row in range(len(rows))]
    assert named == [row.card for row in rows]
    assert [decision.abstained for decision in gates.decisions] == [row.card is None for row in rows]
    assert all(weight in (0.0, 1.0) for weight in gates.weights.flatten().tolist())


def test_scores_are_the_probabilities_of_the_names_by_peft(
    engine: ArrowEngine, without_none: LoRACard, tmp_path: Path
) -> None:
    without_none.to_peft(tmp_path)
    reference = load_peft(tiny_llama(), tmp_path)
    texts = [row.text for row in examples("w60", "w61", "w62")]
    names = ["w60", "w61", "w62"]
    gates = router_on(engine, without_none, names).route_texts(texts)
    for text, decision in zip(texts, gates.decisions, strict=True):
        scores = {candidate.name: candidate.score for candidate in decision.candidates}
        assert scores == pytest.approx(plain_probs(reference, text, names, names), abs=1e-4)
        assert list(scores.values()) == sorted(scores.values(), reverse=True)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "not here"])
def test_names_that_may_not_be_chosen_take_no_part(
    engine: ArrowEngine, without_none: LoRACard, tmp_path: Path, masked: bool
) -> None:
    without_none.to_peft(tmp_path)
    reference = load_peft(tiny_llama(), tmp_path)
    router = router_on(engine, without_none, ["w60", "w61", "w62"] if masked else ["w60", "w62"], threshold=0.0)
    gates = router.route(router.features(["w13"]), mask={"digest of w60", "digest of w62"} if masked else None)
    scores = {candidate.name: candidate.score for candidate in gates.decisions[0].candidates}
    assert scores == pytest.approx(plain_probs(reference, "w13", ["w60", "w61", "w62"], ["w60", "w62"]), abs=1e-4)
    assert gates.attribution(0).keys() == {max(scores, key=scores.__getitem__)}


def test_it_abstains_below_the_threshold_and_says_so(engine: ArrowEngine, without_none: LoRACard) -> None:
    best = router_on(engine, without_none, ["w60", "w61"]).route_texts(["w13"]).decisions[0].candidates[0].score
    for threshold, abstained in ((best - 1e-3, False), (best + 1e-3, True)):
        gates = router_on(engine, without_none, ["w60", "w61"], threshold).route_texts(["w13"])
        (decision,) = gates.decisions
        assert (decision.abstained, decision.threshold) == (abstained, threshold)
        assert bool(gates.weights.any()) is not abstained
        assert ("no card fits" in decision.why) is abstained


def test_without_a_card_that_it_can_name_every_row_abstains(engine: ArrowEngine, trained: LoRACard) -> None:
    router = router_on(engine, trained, ["w60"])
    assert router.unregister("digest of w60")
    assert not router.unregister("digest of w60")
    gates = router.route_texts(["w3", "w4"])
    assert [decision.abstained for decision in gates.decisions] == [True, True]
    assert gates.weights.shape == (2, 0)


def test_cards_for_another_base_are_not_chosen(engine: ArrowEngine, trained: LoRACard) -> None:
    router = router_on(engine, trained, ["w60"])
    router.register_card(Described(digest="elsewhere", name="w61", base_name="other"))
    names = {candidate.name for candidate in router.route_texts(["w13"], base="tiny").decisions[0].candidates}
    assert names == {"w60"}


def test_a_newer_card_of_a_name_takes_its_place(engine: ArrowEngine, trained: LoRACard) -> None:
    router = router_on(engine, trained, ["w60", "w61"])
    router.register_card(Described(digest="newer", name="w60"))
    assert len(router) == 2
    assert router.route_texts(["w3"]).adapters == ("newer",)


def test_stacked_inference_routes_and_answers_on_one_base(
    engine: ArrowEngine, trained: LoRACard, tmp_path: Path
) -> None:
    experts = {name: tiny.card_for(engine, tmp_path, name, seed) for seed, name in enumerate(("w60", "w61"))}
    weights = {name: weight.data_ptr() for name, weight in engine.base.model.named_parameters()}
    router = GenerativeRouter(engine, trained)
    for name, card in experts.items():
        engine.load_lora(card)
        router.register_card(Described(digest=card.digest, name=name))
    engine.router = router
    prompts = ["w3", "w13", "w33"]
    answers = engine.generate(prompts, "auto", max_new_tokens=5)
    assert [dict(answer.adapters) for answer in answers] == [{"w60": 1.0}, {"w61": 1.0}, {}]
    by_hand = engine.generate(prompts, ["w60", "w61", None], max_new_tokens=5)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in by_hand]
    held = {weight.data_ptr() for weight in engine.base.model.parameters()}
    assert held == set(weights.values())  # wrapping renames parameters; none is a copy, none came anew


def test_routing_leaves_the_bare_base_as_it_was(engine: ArrowEngine, trained: LoRACard) -> None:
    before = tiny_llama()(**sample_inputs()).logits
    router_on(engine, trained, ["w60"]).route_texts(["w3"])
    assert torch.equal(engine.base.model(**sample_inputs()).logits, before)


def test_a_card_that_it_was_not_trained_to_name_is_refused(engine: ArrowEngine, trained: LoRACard) -> None:
    router = router_on(engine, trained, [])
    for name in ("w62", "none"):
        with pytest.raises(RoutingError, match=f"trained to name w60, w61, got card '{name}'") as raised:
            router.register_card(Described(digest="new", name=name))
        assert "router train --kind generative" in str(raised.value.hint)


def test_extending_trains_anew_and_names_all_the_cards(engine: ArrowEngine, trained: LoRACard) -> None:
    base = tiny.base(tiny_llama())
    extended = extend(trained, base, examples("w60", "w61", "w62", None), TUNING, version="2")
    assert routes_of(extended) == ("w60", "w61", "w62")
    assert (extended.name, extended.version, list(extended.manifest.parents)) == (trained.name, "2", [trained.digest])
    gates = router_on(engine, extended, ["w60", "w61", "w62"], 0.0).route_texts(["w23", "w3", "w13"])
    assert [next(iter(gates.attribution(row))) for row in range(3)] == ["w62", "w60", "w61"]


def test_extending_without_examples_of_an_old_card_is_refused(trained: LoRACard) -> None:
    with pytest.raises(RoutingError, match="every card that 'router' names, got none of w61"):
        extend(trained, tiny.base(tiny_llama()), examples("w60", "w62"), TUNING, version="2")


def test_what_is_no_router_is_refused(engine: ArrowEngine, trained: LoRACard, tmp_path: Path) -> None:
    with pytest.raises(RoutingError, match="says nothing of routes"):
        GenerativeRouter(engine, tiny.card_for(engine, tmp_path, "expert", 0))
    with pytest.raises(RoutingError, match="between 0 and 1"):
        GenerativeRouter(engine, trained, threshold=1.5)
    other = ArrowEngine(tiny.base(tiny_llama(), name="another"))
    with pytest.raises(AdapterMismatchError, match="trained on tiny"):
        GenerativeRouter(other, trained)


def test_one_card_alone_is_nothing_to_route() -> None:
    with pytest.raises(RoutingError, match="at least two cards, got 1"):
        train_router_lora(tiny.base(tiny_llama()), examples("w60", None), TUNING)
