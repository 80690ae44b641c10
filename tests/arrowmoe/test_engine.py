"""The engine's API: what an adapter argument may be, what an answer says, and that nothing falls back in silence."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arrowmoe.engine import ArrowEngine
from arrowmoe.errors import (
    AdapterMismatchError,
    EngineError,
    GateError,
    ModelLoadError,
    PromptError,
    RoutingError,
    UnknownAdapterError,
)
from arrowmoe.routing.gates import Gates
from registry.card import LoRACard
from registry.errors import CardError, UnknownCardError
from registry.format import LoRAFormat
from registry.store import Registry
from registry.tensor import Role
from tests.arrowmoe.tiny import bert_engine, card_for, llama_engine

TEXTS = ["w5 w9 w12", "w30", "w8 w8 w40 w41"]


@pytest.fixture
def encoder(tmp_path: Path) -> ArrowEngine:
    engine = bert_engine()
    for seed, name in enumerate(("one", "two")):
        engine.load_lora(card_for(engine, tmp_path, name, seed))
    return engine


def test_encode_with_a_name_changes_the_vectors_and_encode_does_not(encoder: ArrowEngine) -> None:
    bare = encoder.encode(TEXTS)
    assert bare.shape == (3, 16)
    assert bare.dtype == np.float32
    assert not np.allclose(encoder.encode_with_lora(TEXTS, adapter="one"), bare)
    assert np.array_equal(encoder.encode_with_lora(TEXTS, adapter=None), bare)


def test_rows_of_one_batch_may_differ(encoder: ArrowEngine) -> None:
    mixed = encoder.encode_with_lora(TEXTS, adapter=["two", None, {"one": 0.5, "two": 0.5}])
    np.testing.assert_allclose(mixed[0], encoder.encode_with_lora(TEXTS, adapter="two")[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(mixed[1], encoder.encode(TEXTS)[1], rtol=1e-4, atol=1e-6)
    mixture = encoder.encode_with_lora(TEXTS, adapter={"one": 0.5, "two": 0.5})
    np.testing.assert_allclose(mixed[2], mixture[2], rtol=1e-4, atol=1e-6)


def test_order_survives_batching(encoder: ArrowEngine) -> None:
    texts = [" ".join(["w9"] * (1 + index % 7)) + f" w{3 + index % 50}" for index in range(70)]
    adapters = [("one", "two", None)[index % 3] for index in range(70)]
    together = encoder.encode_with_lora(texts, adapter=adapters)
    for index in (0, 33, 69):
        alone = encoder.encode_with_lora([texts[index]], adapter=[adapters[index]])
        np.testing.assert_allclose(together[index], alone[0], rtol=1e-4, atol=1e-5)


def test_no_texts_give_no_vectors(encoder: ArrowEngine) -> None:
    assert encoder.encode([]).shape == (0, 16)


def test_an_answer_says_which_cards_made_it(tmp_path: Path) -> None:
    engine = llama_engine()
    for seed, name in enumerate(("one", "two")):
        engine.load_lora(card_for(engine, tmp_path, name, seed))
    generations = engine.generate(TEXTS, adapter=["one", None, {"one": 0.25, "two": 0.75}], max_new_tokens=3)
    assert [dict(generation.adapters) for generation in generations] == [
        {"one": 1.0},
        {},
        {"one": 0.25, "two": 0.75},
    ]
    streamed = [c for c in engine.generate(TEXTS[:1], adapter="two", max_new_tokens=3, stream=True) if c.generation]
    assert dict(streamed[-1].generation.adapters) == {"two": 1.0}


def test_a_stream_that_is_closed_early_leaves_the_engine_usable(tmp_path: Path) -> None:
    engine = llama_engine()
    engine.load_lora(card_for(engine, tmp_path, "one", 0))
    stream = engine.generate(["w5"], adapter="one", max_new_tokens=20, stream=True)
    next(stream)
    stream.close()
    assert engine.generate(["w5"], max_new_tokens=2)[0].adapters == {}


def test_a_stream_keeps_its_adapter_whatever_is_computed_in_between(tmp_path: Path) -> None:
    engine = llama_engine()
    for seed, name in enumerate(("one", "two")):
        engine.load_lora(card_for(engine, tmp_path, name, seed))
    expected = [g.tokens for g in engine.generate(TEXTS, adapter=["one", "two", None], max_new_tokens=8)]
    first = engine.generate(TEXTS, adapter=["one", "two", None], max_new_tokens=8, stream=True)
    second = engine.generate(TEXTS, adapter=["one", "two", None], max_new_tokens=8, stream=True)
    done: dict[str, dict[int, tuple[int, ...]]] = {"first": {}, "second": {}}
    for _ in range(50):
        for name, stream in (("first", first), ("second", second)):
            chunk = next(stream, None)
            if chunk is not None and chunk.generation is not None:
                done[name][chunk.row] = chunk.generation.tokens
        engine.encode(TEXTS[:2])
    assert [done["first"][row] for row in range(3)] == expected
    assert [done["second"][row] for row in range(3)] == expected


def test_an_adapter_removed_under_a_stream_finishes_it_and_is_gone_then(tmp_path: Path) -> None:
    engine = llama_engine()
    engine.load_lora(card_for(engine, tmp_path, "one", 0))
    expected = engine.generate(TEXTS[:1], adapter="one", max_new_tokens=8)[0].tokens
    stream = engine.generate(TEXTS[:1], adapter="one", max_new_tokens=8, stream=True)
    next(stream)
    assert engine.remove_lora("one")
    assert engine.list_loras() == []
    with pytest.raises(UnknownAdapterError):
        engine.generate(TEXTS[:1], adapter="one", max_new_tokens=8)
    (answer,) = [chunk.generation for chunk in stream if chunk.generation is not None]
    assert (answer.tokens, dict(answer.adapters)) == (expected, {"one": 1.0})
    assert engine.residences() == []
    assert engine.memory().slots == 0


def test_a_card_that_is_removed_while_a_request_loads_it_stays_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Registry.open(tmp_path / "home") as registry:
        engine = bert_engine(registry)
        registry.publish(card_for(engine, tmp_path, "one", seed=1))
        read = registry.get

        def read_and_lose(digest: str) -> LoRACard:
            card = read(digest)
            registry.remove(digest)
            engine.remove_lora(digest)
            return card

        monkeypatch.setattr(registry, "get", read_and_lose)
        with pytest.raises(UnknownCardError):
            engine.encode_with_lora(TEXTS, adapter="one")
        assert engine.list_loras() == []


def test_an_adapter_that_is_removed_while_another_is_loaded_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Registry.open(tmp_path / "home") as registry:
        engine = bert_engine(registry)
        engine.load_lora(card_for(engine, tmp_path, "given", seed=1))
        registry.publish(card_for(engine, tmp_path, "kept", seed=2))
        read = registry.get

        def remove_the_other(digest: str) -> LoRACard:
            engine.remove_lora("given")
            return read(digest)

        monkeypatch.setattr(registry, "get", remove_the_other)
        with pytest.raises(UnknownCardError):
            engine.encode_with_lora(TEXTS, adapter={"given": 0.5, "kept": 0.5})


def test_a_new_version_in_the_registry_is_used_at_once(tmp_path: Path) -> None:
    with Registry.open(tmp_path / "home") as registry:
        engine = bert_engine(registry)
        registry.publish(card_for(engine, tmp_path / "v1", "one", seed=1))
        old = engine.encode_with_lora(TEXTS, adapter="one")
        second = card_for(engine, tmp_path / "v2", "one", seed=2).describe(version="2")
        registry.publish(second)
        new = engine.encode_with_lora(TEXTS, adapter="one")
        assert not np.allclose(new, old)
        np.testing.assert_array_equal(engine.encode_with_lora(TEXTS, adapter="one@1"), old)
        assert engine.remove_lora("one")
        assert engine.list_loras() == []


def test_an_answer_names_the_card_however_it_was_asked_for(tmp_path: Path) -> None:
    engine = llama_engine()
    card = card_for(engine, tmp_path, "one", 0)
    engine.load_lora(card)
    (generation,) = engine.generate(["w5"], adapter=card.digest, max_new_tokens=2)
    assert dict(generation.adapters) == {"one": 1.0}


def test_a_weight_that_overflows_is_an_error(tmp_path: Path) -> None:
    engine = llama_engine()
    engine.load_lora(card_for(engine, tmp_path, "one", 0))
    with pytest.raises(EngineError, match="NaN"):
        engine.generate(["w5"], adapter={"one": 1e30}, max_new_tokens=2)


def test_unknown_names_are_errors(encoder: ArrowEngine, tmp_path: Path) -> None:
    with pytest.raises(UnknownAdapterError, match=r"'three'.*one, two"):
        encoder.encode_with_lora(TEXTS, adapter="three")
    with Registry.open(tmp_path / "home") as registry:
        encoder.registry = registry
        with pytest.raises(UnknownCardError):
            encoder.encode_with_lora(TEXTS, adapter="three")
    with pytest.raises(CardError):
        encoder.load_lora(tmp_path / "none.lora.arrow")


def test_a_card_of_another_base_is_refused(tmp_path: Path) -> None:
    engine = llama_engine()
    card = card_for(engine, tmp_path, "one", 0)
    other = LoRACard.from_peft(tmp_path / "one", base_name="someone/other-model")
    with pytest.raises(AdapterMismatchError, match=r"someone/other-model.*tiny"):
        engine.load_lora(other)
    assert engine.load_lora(card) == "one"
    encoder_card = card_for(bert_engine(), tmp_path, "enc", 0)
    with pytest.raises(AdapterMismatchError, match="modules that the base model lacks"):
        engine.load_lora(encoder_card)


def test_adapters_come_from_files_and_from_the_registry(tmp_path: Path) -> None:
    with Registry.open(tmp_path / "home") as registry:
        engine = bert_engine(registry)
        card = card_for(engine, tmp_path, "one", 0)
        LoRAFormat.save(card, tmp_path / "one.lora.arrow")
        engine.load_lora(tmp_path / "one.lora.arrow")
        by_file = engine.encode_with_lora(TEXTS, adapter="one")
        assert engine.remove_lora("one")
        assert not engine.remove_lora("one")
        registry.publish(card)
        np.testing.assert_array_equal(engine.encode_with_lora(TEXTS, adapter="one"), by_file)
        assert [entry.name for entry in engine.list_loras()] == ["one"]


def test_a_republished_name_does_not_serve_stale_weights(tmp_path: Path) -> None:
    engine = bert_engine()
    engine.load_lora(card_for(engine, tmp_path / "v1", "one", seed=1))
    old = engine.encode_with_lora(TEXTS, adapter="one")
    engine.load_lora(card_for(engine, tmp_path / "v2", "one", seed=2))
    assert not np.allclose(engine.encode_with_lora(TEXTS, adapter="one"), old)


@pytest.mark.parametrize(
    ("adapter", "error"),
    [("auto", RoutingError), (["one"], GateError), ({"one": float("nan")}, GateError)],
)
def test_impossible_gates_are_errors(encoder: ArrowEngine, adapter: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        encoder.encode_with_lora(TEXTS, adapter=adapter)


def test_gates_must_have_a_row_per_text(encoder: ArrowEngine) -> None:
    with pytest.raises(GateError, match="3 rows, got 1"):
        encoder.encode_with_lora(TEXTS, adapter=Gates.of([{}], {}))


def test_one_string_is_not_a_list(encoder: ArrowEngine) -> None:
    with pytest.raises(PromptError, match="list"):
        encoder.encode("w5")
    with pytest.raises(PromptError, match="list"):
        llama_engine().generate("w5")
    with pytest.raises(PromptError, match="list of stop strings"):
        llama_engine().generate(["w5"], stop="w9")


def test_a_list_of_messages_is_not_a_list_of_prompts() -> None:
    with pytest.raises(PromptError, match="one message"):
        llama_engine().generate([{"role": "user", "content": "w5"}])


def test_empty_texts_are_zero_vectors_where_the_tokenizer_adds_nothing(encoder: ArrowEngine) -> None:
    assert not encoder.encode([""]).any()
    np.testing.assert_array_equal(encoder.encode(["", "w5"])[0], encoder.encode([""])[0])


def test_a_card_that_is_held_does_not_take_over_a_name(encoder: ArrowEngine, tmp_path: Path) -> None:
    before = encoder.encode_with_lora(TEXTS, adapter="one")
    namesake = card_for(encoder, tmp_path / "peer", "one", seed=9)
    encoder.hold(namesake)
    np.testing.assert_array_equal(encoder.encode_with_lora(TEXTS, adapter="one"), before)
    assert not np.allclose(encoder.encode_with_lora(TEXTS, adapter=namesake.digest), before)


def test_an_encoder_cannot_generate(encoder: ArrowEngine) -> None:
    with pytest.raises(EngineError, match="encoder"):
        encoder.generate(["w5"])


@pytest.mark.parametrize("model", ["builtin:none", "/no/such/file.gguf"])
def test_a_model_that_is_not_there_is_an_error(model: str) -> None:
    with pytest.raises(ModelLoadError):
        ArrowEngine.from_pretrained(model)


def test_a_file_that_is_no_gguf_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "junk.gguf"
    path.write_bytes(b"junk")
    with pytest.raises(ModelLoadError, match=r"junk\.gguf"):
        ArrowEngine.from_pretrained(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_a_device_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no CUDA here"):
        ArrowEngine.from_pretrained(tmp_path, device="cuda:0")


def test_a_directory_is_loaded_with_its_pooling(tmp_path: Path, encoder: ArrowEngine) -> None:
    bare = bert_engine()
    bare.base.model.save_pretrained(tmp_path / "tiny")
    bare.base.tokenizer.save_pretrained(tmp_path / "tiny")
    loaded = ArrowEngine.from_pretrained(tmp_path / "tiny", device="cpu")
    assert (loaded.base.kind, loaded.base.name) == ("encoder", "tiny")
    np.testing.assert_array_equal(loaded.encode(TEXTS), bare.encode(TEXTS))
    assert not any(parameter.requires_grad for parameter in loaded.base.model.parameters())


def at_once(work: Callable[[Any], None], arguments: Iterable[Any]) -> None:
    """`work` on each of `arguments`, in a thread of its own; returns when all have ended."""
    threads = [threading.Thread(target=work, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_do_not_mix_their_gates(encoder: ArrowEngine) -> None:
    expected = {name: encoder.encode_with_lora(TEXTS, adapter=name) for name in ("one", "two", None)}
    wrong: list[str | None] = []

    def work(name: str | None) -> None:
        for _ in range(10):
            if not np.array_equal(encoder.encode_with_lora(TEXTS, adapter=name), expected[name]):
                wrong.append(name)

    at_once(work, expected)
    assert not wrong


def test_threads_share_a_budget_for_one_adapter(encoder: ArrowEngine, tmp_path: Path) -> None:
    expected = {name: encoder.encode_with_lora(TEXTS, adapter=name) for name in ("one", "two")}
    tight = ArrowEngine(bert_engine().base, budget_bytes=encoder.list_loras()[0].nbytes)
    for seed, name in enumerate(expected):
        tight.load_lora(card_for(encoder, tmp_path / "again", name, seed))
    wrong: list[str] = []

    def work(name: str) -> None:
        for _ in range(10):
            if not np.allclose(tight.encode_with_lora(TEXTS, adapter=name), expected[name], rtol=1e-4, atol=1e-6):
                wrong.append(name)

    at_once(work, expected)
    assert not wrong
    assert sum(one.uses for one in tight.residences()) == 20


def test_what_left_comes_back_from_the_registry_and_a_new_version_is_not_taken_for_the_old(tmp_path: Path) -> None:
    with Registry.open(tmp_path / "home") as registry:
        first = card_for(bert_engine(), tmp_path / "v1", "one", seed=1)
        cards = [first, card_for(bert_engine(), tmp_path / "other", "other", seed=2)]
        cards.append(card_for(bert_engine(), tmp_path / "v2", "one", seed=3).describe(version="2"))
        weights = sum(tensor.nbytes for tensor in first.manifest.tensors if tensor.role in (Role.A, Role.B))
        engine = ArrowEngine(bert_engine().base, registry=registry, budget_bytes=weights)
        roomy = bert_engine()
        expected = []
        for card in cards:
            roomy.load_lora(card)
            expected.append(roomy.encode_with_lora(TEXTS, adapter=card.digest))
        for card in cards[:2]:
            registry.publish(card)
        for _ in range(2):
            np.testing.assert_array_equal(engine.encode_with_lora(TEXTS, adapter="one"), expected[0])
            np.testing.assert_array_equal(engine.encode_with_lora(TEXTS, adapter="other"), expected[1])
        registry.publish(cards[2])
        np.testing.assert_array_equal(engine.encode_with_lora(TEXTS, adapter="one"), expected[2])
        np.testing.assert_array_equal(engine.encode_with_lora(TEXTS, adapter="one@1"), expected[0])
        assert engine.memory().slots == weights
