"""An engine and a router as the night asks them: losses as PEFT has them, answers as the engine gives, nothing left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from arrowmoe.engine import ArrowEngine
from arrowmoe.features import TextFeaturizer
from arrowmoe.routing import LoRARouter
from arrowmoe.routing.statistics import CardStatistics
from arrowmoe.students import EngineStudent, EngineStudents, NightRoutes
from evolution.protocols import Example, Use
from registry.card import LoRACard
from registry.store import Registry
from tests.arrowmoe.routing.topics import Topics, prompts
from tests.arrowmoe.tiny import bert_engine, card_for, llama_engine, tokenizer
from tests.peft_models import load_peft, tiny_bert, tiny_llama

EXAMPLES = [
    Example(prompt="w3 w4 w5", answer="w6 w7"),
    Example(prompt="w8", answer="w9"),
    Example(prompt="w10 w11 w12 w13", answer="w14 w15 w16 w17"),
    *(Example(prompt=f"w{index}", answer=f"w{index + 1} w{index + 2}") for index in range(20, 40)),
]


@pytest.fixture
def registry(home: Path) -> Iterator[Registry]:
    with Registry.open(home) as registry:
        yield registry


@pytest.fixture
def engine(registry: Registry) -> ArrowEngine:
    return llama_engine(registry)


@pytest.fixture
def card(engine: ArrowEngine, tmp_path: Path) -> LoRACard:
    return card_for(engine, tmp_path, "north", seed=3)


def reference(model: torch.nn.Module, example: Example) -> tuple[torch.Tensor, torch.Tensor]:
    """log P (answer tokens, vocabulary) and the tokens that are wanted, by hand: the chat template adds nothing."""
    words = tokenizer()
    asked, wanted = words(example.prompt)["input_ids"], [*words(example.answer)["input_ids"], words.eos_token_id]
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([asked + wanted])).logits[0]
    return logits[len(asked) - 1 : -1].log_softmax(-1), torch.tensor(wanted)


def test_losses_are_those_of_peft_row_by_row(engine: ArrowEngine, card: LoRACard, tmp_path: Path) -> None:
    uses = [None if at % 3 == 0 else Use(card=card) for at in range(len(EXAMPLES))]
    found = EngineStudent(engine).losses(EXAMPLES, uses)
    bare, adapted = tiny_llama(), load_peft(tiny_llama(), tmp_path / "north")
    for value, example, use in zip(found, EXAMPLES, uses, strict=True):
        logp, wanted = reference(bare if use is None else adapted, example)
        assert value == pytest.approx(float(functional.nll_loss(logp, wanted)), abs=1e-5)


def test_divergences_are_kl_of_the_bare_base_to_the_adapted(
    engine: ArrowEngine, card: LoRACard, tmp_path: Path
) -> None:
    uses = [None if at % 3 == 0 else Use(card=card) for at in range(len(EXAMPLES))]
    found = EngineStudent(engine).divergences(EXAMPLES, uses)
    bare, adapted = tiny_llama(), load_peft(tiny_llama(), tmp_path / "north")
    for value, example, use in zip(found, EXAMPLES, uses, strict=True):
        base, other = reference(bare, example)[0], reference(adapted, example)[0]
        wanted = 0.0 if use is None else float((base.exp() * (base - other)).sum(-1).mean())
        assert value == pytest.approx(wanted, abs=1e-5)


def test_a_scale_is_that_of_the_card(engine: ArrowEngine, card: LoRACard) -> None:
    student, rows = EngineStudent(engine), len(EXAMPLES)
    half = student.losses(EXAMPLES, [Use(card=card, scale=0.5)] * rows)
    assert np.allclose(half, student.losses(EXAMPLES, [Use(card=card.scaled(0.5))] * rows), atol=1e-5)
    assert not np.allclose(half, student.losses(EXAMPLES, [Use(card=card)] * rows), atol=1e-3)


def test_answers_are_those_of_the_engine(engine: ArrowEngine, registry: Registry, card: LoRACard) -> None:
    digest = registry.publish(card).digest
    asked = [f"w{index} w{index + 5}" for index in range(3, 50)]
    uses = [Use(card=digest) if at % 2 else None for at in range(len(asked))]
    student = EngineStudent(engine)
    replies = student.answer(asked, uses, max_new_tokens=6)
    for at, (prompt, use, reply) in enumerate(zip(asked, uses, replies, strict=True)):
        adapter = None if use is None else "north"
        [made] = engine.generate([[{"role": "user", "content": prompt}]], adapter=adapter, max_new_tokens=6)
        assert (reply.text, reply.tokens) == (made.text, len(made.tokens)), at
        assert reply.sequence_nats == pytest.approx(-made.logprob_nats, abs=1e-4)


def test_draws_are_seeded(engine: ArrowEngine) -> None:
    student = EngineStudent(engine)

    def draw(seed: int) -> list[str]:
        return [reply.text for reply in student.answer(["w3"] * 8, [None] * 8, temperature=1.5, seed=seed)]

    assert draw(1) == draw(1) != draw(2)


def test_an_encoder_gives_unit_rows_of_each_card(registry: Registry, tmp_path: Path) -> None:
    engine = bert_engine(registry)
    card = card_for(engine, tmp_path, "north", seed=3)
    texts = [f"w{index} w{index + 1}" for index in range(3, 43)]
    uses = [Use(card=card) if at % 2 else None for at in range(len(texts))]
    student = EngineStudent(engine)
    rows = student.encode(texts, uses)
    assert student.kind == "encoder"
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    model = load_peft(tiny_bert(), tmp_path / "north")
    for at in (0, 1, 38, 39):
        ids = torch.tensor([tokenizer()(texts[at])["input_ids"]])
        with torch.inference_mode():
            states = (tiny_bert() if uses[at] is None else model)(input_ids=ids).last_hidden_state[0]
        assert np.allclose(rows[at], functional.normalize(states.mean(0), dim=0).numpy(), atol=1e-5)


def test_a_candidate_is_let_go_of_and_the_registrys_cards_stay(
    engine: ArrowEngine, registry: Registry, card: LoRACard, tmp_path: Path
) -> None:
    served = registry.publish(card_for(engine, tmp_path, "south", seed=4)).digest
    engine.load_lora("south")
    before = engine.generate(["w3 w4"], adapter=None, max_new_tokens=4)[0].tokens
    with EngineStudents(lambda base: engine).open("tiny") as student:
        student.answer(["w3", "w4", "w5"], [Use(card=card), Use(card=served), None], max_new_tokens=2)
        assert {loaded.name for loaded in engine.list_loras()} == {"north", "south"}
    assert [loaded.digest for loaded in engine.list_loras()] == [served]
    assert engine.generate(["w3 w4"], adapter=None, max_new_tokens=4)[0].tokens == before


# The router -----------------------------------------------------------------------------------------------------


class World:
    """A registry whose cards serve, and the night's own router over them."""

    def __init__(self, registry: Registry, directory: Path) -> None:
        self.registry, self.directory = registry, directory
        self.featurizer = TextFeaturizer(Topics())
        self.serving = LoRARouter(self.featurizer)
        self.night = NightRoutes(self.featurizer, self.register)

    def register(self, router: LoRARouter) -> None:
        for entry in self.registry.newest():
            router.register_card(entry, CardStatistics.of_card(self.registry.get(entry.digest)))

    def card(self, topic: str, seed: int, version: str = "1") -> LoRACard:
        bare = card_for(llama_engine(), self.directory, topic, seed=seed).describe(version=version)
        return self.night.describe(bare, prompts(topic, 60), prompts(topic, 60, first=10_000))

    def publish(self, topic: str, seed: int, version: str = "1") -> str:
        return self.registry.publish(self.card(topic, seed, version)).digest


@pytest.fixture
def world(registry: Registry, tmp_path: Path) -> World:
    return World(registry, tmp_path)


def test_a_candidate_is_among_the_cards_and_serves_nobody(world: World) -> None:
    east = world.publish("east", 1)
    world.register(world.serving)
    before = world.serving.digests()
    candidate = world.card("north", 2)
    asked = [*prompts("east", 20, first=500), *prompts("north", 20, first=500), *prompts("south", 20)]
    covers = world.night.covers(asked, base="tiny", candidate=candidate)
    assert np.mean([cover.accepted and cover.digest == east for cover in covers[:20]]) > 0.8
    assert np.mean([cover.accepted and cover.digest == candidate.digest for cover in covers[20:40]]) > 0.8
    assert not any(cover.accepted for cover in covers[40:])
    assert world.serving.digests() == before
    assert not any(cover.accepted for cover in world.night.covers(asked[20:], base="tiny")), (
        "nor is it there afterwards"
    )
    assert all(decision.abstained for decision in world.serving.route_texts(asked[20:40], base="tiny").decisions)


def test_a_newer_version_takes_the_place_of_the_older(world: World) -> None:
    world.publish("north", 1)
    candidate = world.card("north", 2, version="2")
    covers = world.night.covers(prompts("north", 20, first=500), base="tiny", candidate=candidate)
    assert {cover.digest for cover in covers if cover.accepted} == {candidate.digest}


def test_cards_that_came_or_went_are_noticed(world: World) -> None:
    asked = prompts("north", 20, first=500)
    assert not any(cover.accepted for cover in world.night.covers(asked, base="tiny"))
    digest = world.publish("north", 1)
    assert {cover.digest for cover in world.night.covers(asked, base="tiny") if cover.accepted} == {digest}
    assert not any(cover.accepted for cover in world.night.covers(asked, base="other"))
    world.registry.remove(digest)
    assert not any(cover.accepted for cover in world.night.covers(asked, base="tiny"))


def test_features_are_unit_rows_and_embedded_once(world: World) -> None:
    embedder = Topics()
    routes = NightRoutes(TextFeaturizer(embedder), lambda router: None)
    rows = routes.features(["north 1", "east 1", "north 1"])
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    asked = len(embedder.asked)
    assert np.array_equal(routes.features(["east 1"]), rows[1:2])
    assert len(embedder.asked) == asked
    assert routes.features([]).shape == (0, rows.shape[1])
