"""The node with real parts: registries on disk, Flight on loopback, tiny models from directories."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arrowmoe.control import call
from arrowmoe.engine import ArrowEngine
from arrowmoe.errors import EngineError, ModelLoadError
from arrowmoe.home import HomeHeldError, NodeError, running_node
from arrowmoe.node import Node
from arrowmoe.settings import Settings
from federation.errors import FederationError
from registry.card import LoRACard
from registry.store import Registry
from tests.arrowmoe.tiny import card_for, llama_engine
from tests.peft_models import make_peft, tiny_bert
from tests.registry.cards import small_card

pytestmark = pytest.mark.usefixtures("no_leaked_threads")
DEAD = "127.0.0.1:1"


def settings(home: Path, **changes: Any) -> Settings:
    return Settings(**{"home": home, "name": home.name, "discovery": False, "peer_interval_s": 0.1} | changes)


def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def dates_card(directory: Path, **about: Any) -> LoRACard:
    card = card_for(llama_engine(), directory, "dates", seed=3)
    return card.describe(**{"description": "w3 w4", "examples": ["w5 w6"]} | about)


@contextmanager
def two_nodes(
    make_home: Callable[[str], Path], tiny_models: tuple[Path, Path], card: LoRACard
) -> Iterator[tuple[Node, Node]]:
    """A node that serves `card`, and one with models that knows it as a peer."""
    causal, encoder = tiny_models
    models = {"bases": (str(causal),), "embedder": str(encoder)}
    with Node(settings(make_home("giver"))) as giver:
        giver.registry.publish(card)
        with Node(settings(make_home("asker"), peers=(giver.record.address,), **models)) as asker:
            yield giver, asker


def test_a_virtual_candidate_is_fetched_when_it_is_chosen(
    make_home: Callable[[str], Path], tiny_models: tuple[Path, Path], tmp_path: Path
) -> None:
    with two_nodes(make_home, tiny_models, dates_card(tmp_path)) as (giver, asker):
        eventually(lambda: len(asker.inference.offers) == 1)
        gates = asker.route("w5 w6")
        assert gates.attribution(0) == {"dates": pytest.approx(1.0)}
        assert gates.decisions[0].candidates[0].virtual
        assert asker.registry.digests() == set()

        answer = asker.ask("w5 w6", max_new_tokens=4)
        assert (dict(answer.adapters), answer.fetched) == ({"dates": pytest.approx(1.0)}, ("dates",))
        entry = asker.registry.entry("dates")
        assert entry.origin is not None
        assert (entry.origin.peer_id, entry.origin.address) == (giver.record.node_id, giver.record.address)

        again = asker.ask("w5 w6", max_new_tokens=4)
        assert (again.text, again.fetched) == (answer.text, ())
        assert not again.gates.decisions[0].candidates[0].virtual


def test_a_fetched_card_does_not_take_over_the_name_of_a_newer_one_here(
    make_home: Callable[[str], Path], tiny_models: tuple[Path, Path], tmp_path: Path
) -> None:
    with two_nodes(make_home, tiny_models, dates_card(tmp_path)) as (_, asker):
        newer = dates_card(tmp_path, version="2", description="w40 w41", examples=["w42"])
        own = asker.registry.publish(newer)
        eventually(lambda: len(asker.inference.offers) == 1)
        assert asker.ask("w5 w6", max_new_tokens=1).fetched == ("dates",)
        assert asker.ask("w5 w6", adapter="dates", max_new_tokens=1).gates.adapters == (own.digest,)


def test_answers_equal_those_of_an_engine_by_itself(
    make_home: Callable[[str], Path], tiny_models: tuple[Path, Path], tmp_path: Path
) -> None:
    card = dates_card(tmp_path)
    alone = ArrowEngine.from_pretrained(tiny_models[0])
    alone.load_lora(card)
    prompt = [[{"role": "user", "content": "w5 w6"}]]
    with two_nodes(make_home, tiny_models, card) as (_, asker):
        asker.sync()
        assert asker.ask("w5 w6", max_new_tokens=8).text == alone.generate(prompt, "dates", max_new_tokens=8)[0].text
        bare = asker.ask("w5 w6", adapter=None, max_new_tokens=8)
        with pytest.raises(EngineError, match="no base model other is loaded; loaded are: tiny, tiny-encoder"):
            asker.ask("w5", base="other")
        assert (bare.text, bare.adapters) == (alone.generate(prompt, max_new_tokens=8)[0].text, {})
        texts = ["w3 w4", "w9"]
        expected = ArrowEngine.from_pretrained(tiny_models[1]).encode(texts)
        np.testing.assert_allclose(asker.encode(texts), expected, rtol=1e-5, atol=1e-6)


def test_encoding_fetches_what_it_routes_to(
    make_home: Callable[[str], Path], tiny_models: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter = make_peft(tiny_bert(), tmp_path / "tickets", seed=5)
    card = LoRACard.from_peft(adapter, base_name="tiny-encoder", description="w3 w4")
    alone = ArrowEngine.from_pretrained(tiny_models[1])
    alone.load_lora(card)
    with two_nodes(make_home, tiny_models, card) as (_, asker):
        eventually(lambda: len(asker.inference.offers) == 1)
        expected = alone.encode_with_lora(["w3 w4"], adapter="tickets")
        np.testing.assert_allclose(asker.encode(["w3 w4"], adapter="auto"), expected, rtol=1e-5, atol=1e-6)
        assert asker.registry.entry("tickets").origin is not None


def test_cards_that_come_and_go_are_routed_at_once(
    make_home: Callable[[str], Path], tiny_models: tuple[Path, Path], tmp_path: Path
) -> None:
    causal, encoder = tiny_models
    home = make_home("alone")
    with Node(settings(home, bases=(str(causal),), embedder=str(encoder))) as node:
        assert node.route("w5 w6").attribution(0) == {}
        with Registry.open(home) as other_process:
            other_process.publish(dates_card(tmp_path))
        assert node.ask("w5 w6", max_new_tokens=2).adapters
        assert node.status()["models"][0]["adapters"] == ["dates"]
        node.registry.remove("dates")
        bare = node.ask("w5 w6", max_new_tokens=2)
        assert bare.adapters == {}
        assert bare.gates.decisions[0].abstained
        assert node.status()["models"][0]["adapters"] == []


def test_only_the_newest_version_of_a_name_is_routed_to(
    make_home: Callable[[str], Path], tiny_models: tuple[Path, Path], tmp_path: Path
) -> None:
    causal, encoder = tiny_models
    with Node(settings(make_home("alone"), bases=(str(causal),), embedder=str(encoder))) as node:
        old = node.registry.publish(dates_card(tmp_path))
        assert node.route("w5 w6").adapters == (old.digest,)
        new = node.registry.publish(dates_card(tmp_path, version="2"))
        assert node.route("w5 w6").adapters == (new.digest,)
        assert [candidate.digest for candidate in node.route("w5 w6").decisions[0].candidates] == [new.digest]
        node.registry.remove("dates@2")
        assert node.route("w5 w6").adapters == (old.digest,)


def test_offers_of_peers_can_be_left_alone(
    make_home: Callable[[str], Path], tiny_models: tuple[Path, Path], tmp_path: Path
) -> None:
    causal, encoder = tiny_models
    with Node(settings(make_home("giver"))) as giver:
        giver.registry.publish(dates_card(tmp_path))
        models = {"bases": (str(causal),), "embedder": str(encoder), "route_to_offers": False}
        with Node(settings(make_home("asker"), peers=(giver.record.address,), **models)) as asker:
            eventually(lambda: len(asker.swarm.offers) == 1)
            assert asker.route("w5 w6").attribution(0) == {}


def test_what_no_peer_offers_any_more_is_routed_to_no_more(
    make_home: Callable[[str], Path], tiny_models: tuple[Path, Path], tmp_path: Path
) -> None:
    with two_nodes(make_home, tiny_models, dates_card(tmp_path)) as (giver, asker):
        eventually(lambda: len(asker.inference.offers) == 1)
        giver.registry.remove("dates")
        eventually(lambda: not asker.inference.offers)
        assert asker.ask("w5 w6", max_new_tokens=2).adapters == {}


def test_a_model_that_cannot_be_loaded_is_told_and_the_node_serves_on(
    home: Path, tiny_models: tuple[Path, Path]
) -> None:
    nowhere = str(home / "nowhere.gguf")
    with Node(settings(home, bases=(nowhere, str(tiny_models[0])), embedder=str(tiny_models[1]))) as node:
        assert node.ask("w5", adapter=None, max_new_tokens=2).text
        with pytest.raises(ModelLoadError, match="no such file"):
            node.ask("w5", base=nowhere)
        states = {model["model"]: model["state"] for model in node.status()["models"]}
        assert (states[nowhere], states[str(tiny_models[0])]) == ("error", "ready")


def test_a_node_without_models_says_so(home: Path) -> None:
    with Node(settings(home)) as node:
        with pytest.raises(EngineError, match="no base model") as caught:
            node.ask("w5")
        assert "--base" in str(caught.value.hint)
        with pytest.raises(EngineError, match="no router"):
            node.route("w5")
        assert node.status()["models"] == []


def test_a_sync_reports_each_peer_and_the_dead_one(make_home: Callable[[str], Path]) -> None:
    with Node(settings(make_home("giver"))) as giver, Node(settings(make_home("taker"))) as taker:
        cards = [giver.registry.publish(small_card(f"card-{index}", seed=index)) for index in range(3)]
        addresses = [giver.record.address, DEAD]
        dry = taker.sync(addresses, dry_run=True)
        assert (len(dry.peers[0].missing), dry.bytes_moved, taker.registry.digests()) == (3, 0, set())
        progress: list[int] = []
        report = taker.sync(addresses, on_progress=lambda done: progress.append(done.cards_done))
        assert {entry.digest for entry in report.fetched} == {entry.digest for entry in cards}
        assert progress[-1] == 3
        assert report.peers[0].peer.node_id == giver.record.node_id
        assert report.peers[1].error is not None
        assert taker.sync([giver.record.address]).bytes_moved == 0


def test_peers_are_asked_live(make_home: Callable[[str], Path]) -> None:
    with Node(settings(make_home("giver"))) as giver:
        giver.registry.publish(small_card())
        with Node(settings(make_home("taker"), peers=(giver.record.address, DEAD))) as taker:
            alive, dead = taker.peers()
            assert (alive.peer.name, alive.offered, len(alive.missing), alive.error) == ("giver", 1, 1, None)
            assert (dead.peer.address, dead.error is None) == (DEAD, False)


def test_sync_on_start_brings_everything_by_itself(make_home: Callable[[str], Path]) -> None:
    with Node(settings(make_home("giver"))) as giver:
        entry = giver.registry.publish(small_card())
        with Node(settings(make_home("taker"), peers=(giver.record.address,), sync_on_start=True)) as taker:
            eventually(lambda: taker.registry.digests() == {entry.digest})


def test_the_control_channel_answers_what_the_node_does(make_home: Callable[[str], Path]) -> None:
    with Node(settings(make_home("giver"))) as giver, Node(settings(make_home("taker"))) as taker:
        entry = giver.registry.publish(small_card())
        record = running_node(taker.settings.home)
        assert record == taker.record
        seen: list[Any] = []
        report = call(record, "sync", {"peers": [giver.record.address]}, on_progress=seen.append)
        assert [card["digest"] for card in report["peers"][0]["fetched"]] == [entry.digest]
        assert seen[-1]["bytes_done"] == seen[-1]["bytes_total"] == entry.nbytes
        assert call(record, "status")["cards"] == 1
        assert call(record, "stop")["stopping"]
        waited = threading.Thread(target=taker.wait)
        waited.start()
        waited.join(5)
        assert not waited.is_alive()


def test_a_home_has_one_node(home: Path) -> None:
    with Node(settings(home)), pytest.raises(HomeHeldError):
        Node(settings(home)).start()
    with Node(settings(home)) as node:
        assert node.status()["running"]


def test_a_start_that_fails_lets_go_of_the_home(home: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(FederationError, match="cannot listen"),
    ):
        Node(settings(home, flight_port=taken.getsockname()[1])).start()
    with Node(settings(home)):
        pass
    assert running_node(home) is None


def test_a_node_that_is_not_started_says_so(home: Path) -> None:
    with pytest.raises(NodeError, match="not started"):
        Node(settings(home)).status()


@pytest.mark.network
def test_two_nodes_find_each_other(make_home: Callable[[str], Path]) -> None:
    with (
        Node(settings(make_home("one"), discovery=True)) as one,
        Node(settings(make_home("two"), discovery=True)) as two,
    ):
        eventually(lambda: two.record.node_id in {peer.node_id for peer in one.swarm.company().asked})
        eventually(lambda: one.record.node_id in {peer.node_id for peer in two.swarm.company().asked})
        assert one.status()["discovery"] == "on"
