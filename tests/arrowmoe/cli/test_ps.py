from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from arrowmoe.node import Node
from arrowmoe.setting_groups import EngineSettings
from arrowmoe.settings import Settings
from registry.tensor import Role
from tests.arrowmoe.cli.conftest import Cli
from tests.arrowmoe.tiny import card_for, llama_engine

ADAPTER_KEYS = {
    *("digest", "name", "tier", "nbytes", "uses", "used_at", "pinned", "priority", "in_flight", "leaving"),
}


@pytest.fixture
def node(home: Path, tiny_models: tuple[Path, Path]) -> Iterator[Node]:
    settings = Settings(
        home=home,
        discovery=False,
        bases=(str(tiny_models[0]),),
        embedder=str(tiny_models[1]),
        engine=EngineSettings(budget_mib=0.012),  # room for one of the cards below
    )
    with Node(settings) as running:
        yield running


def test_the_adapters_of_a_running_node_are_told_as_they_are(cli: Cli, node: Node, tmp_path: Path) -> None:
    node.inference.engine()  # waits until it is loaded
    cards = [card_for(llama_engine(), tmp_path, name, seed) for seed, name in enumerate(("one", "two"))]
    nbytes = sum(tensor.nbytes for tensor in cards[0].manifest.tensors if tensor.role in (Role.A, Role.B))
    assert nbytes <= 0.012 * 2**20 < 2 * nbytes
    for card in cards:
        node.registry.publish(card)
        cli("ask", "w5", "--adapter", card.name, "--max-new-tokens", "2")

    tiny = next(model for model in cli("skills", "ps", "--json").json if model["base"] == "tiny")
    assert tiny["bytes"] == {"slots": nbytes, "budget": int(0.012 * 2**20), "layouts": 0, "host": 0}
    assert 0 < tiny["process"]["resident"] < tiny["process"]["limit"]
    assert (tiny["device"], tiny["loads"]["ahead"]) == (None, 0)
    assert [set(card) for card in tiny["adapters"]] == [ADAPTER_KEYS] * 2
    assert [(card["name"], card["tier"], card["nbytes"]) for card in tiny["adapters"]] == [
        ("one", "file", nbytes),
        ("two", "device", nbytes),
    ]
    assert all(card["uses"] > 0 and card["used_at"] for card in tiny["adapters"])

    shown = cli("skills", "ps").out
    assert "slots 8.0 KiB of 12.3 KiB" in shown
    assert "loads: 0 ahead, 0 waited for" in shown
    assert [line.split()[0] for line in shown.splitlines() if " file " in line or " device " in line] == ["one", "two"]
    assert cli("skills", "ps", "-q").out.split() == [card["digest"] for card in tiny["adapters"]]


def test_without_a_node_there_is_nothing_to_list(cli: Cli) -> None:
    ran = cli("skills", "ps")
    assert (ran.code, "no node runs" in ran.err) == (1, True)
