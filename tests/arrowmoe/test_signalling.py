"""Signals: what a routed request tells, that an error loses no answer, and that nothing else is recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from arrowmoe.routing import LoRARouter
from arrowmoe.settings import EvolutionSettings
from arrowmoe.signalling import SignalRecorder, signal_store
from evolution.signals import SignalStore
from registry.database import Database
from registry.errors import RegistryError
from registry.store import Registry
from tests.arrowmoe.routing.topics import prompts, router, statistics
from tests.arrowmoe.tiny import card_for, llama_engine


@pytest.fixture
def registry(home: Path) -> Registry:
    return Registry.open(home)


@pytest.fixture
def routes(registry: Registry, tmp_path: Path) -> LoRARouter:
    made = router()
    entry = registry.publish(card_for(llama_engine(), tmp_path, "north", seed=1))
    made.register_card(entry, statistics(made, "north"))
    return made


def store(registry: Registry, **settings: object) -> SignalStore:
    return signal_store(registry.database, EvolutionSettings(**settings))


def test_a_routed_request_leaves_a_signal_that_feedback_finds(registry: Registry, routes: LoRARouter) -> None:
    engine, signals = llama_engine(registry), store(registry)
    engine.router, engine.observer = routes, SignalRecorder(signals)
    fits, alien = engine.generate([prompts("north", 1)[0], "w3 w4"], adapter="auto", max_new_tokens=5)
    found = {signal.prompt: signal for signal in signals.recent()}
    one, other = found["north 0"], found["w3 w4"]
    assert (one.base, one.accepted, one.card) == ("tiny", True, registry.get("north").digest)
    assert (one.answer, one.tokens) == (fits.text, len(fits.tokens))
    assert one.sequence_nats == pytest.approx(-fits.logprob_nats)
    assert one.p_value is not None
    assert (other.accepted, other.card, other.answer) == (False, None, alien.text)
    assert fits.signal == one.id
    signals.feedback(fits.signal, "bad", correction="w9")
    assert {signal.feedback for signal in signals.recent()} == {"bad", None}


@pytest.mark.parametrize("adapter", [None, "north"])
def test_what_no_router_decided_is_not_recorded(registry: Registry, routes: LoRARouter, adapter: str | None) -> None:
    engine, signals = llama_engine(registry), store(registry)
    engine.router, engine.observer = routes, SignalRecorder(signals)
    [answer] = engine.generate(["north 0"], adapter=adapter, max_new_tokens=2)
    assert answer.signal is None
    assert signals.recent() == []


def test_the_owner_may_switch_it_off(registry: Registry, routes: LoRARouter) -> None:
    engine, signals = llama_engine(registry), store(registry, signals=False)
    engine.router, engine.observer = routes, SignalRecorder(signals)
    assert engine.generate(["w3"], adapter="auto", max_new_tokens=2)[0].signal is None
    assert signals.recent() == []


def test_an_answer_is_not_lost_with_its_signal(
    registry: Registry, routes: LoRARouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Database) -> None:
        raise RegistryError("the disk is full")

    engine = llama_engine(registry)
    engine.router, engine.observer = routes, SignalRecorder(store(registry))
    monkeypatch.setattr(Database, "writing", full)
    [answer] = engine.generate(["w3"], adapter="auto", max_new_tokens=2)
    assert len(answer.tokens) > 0
    assert answer.signal is None
