"""`skills push`: to nodes that take cards, and to those that only fetch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from arrowmoe.node import Node
from arrowmoe.setting_groups import TrustSettings
from arrowmoe.settings import Settings
from registry.peers import PeerBook
from registry.store import Registry
from tests.arrowmoe.cli.conftest import Cli
from tests.registry.cards import small_card


@pytest.fixture
def own_id(home: Path) -> str:
    """The id of this test's home, which has two cards."""
    with Registry.open(home) as registry:
        for name in ("poet", "smith"):
            registry.publish(small_card(name))
        return registry.identity.id


@contextmanager
def taking(home: Path, **trust: object) -> Iterator[Node]:
    settings = Settings(home=home, name="taker", discovery=False, trust=TrustSettings(**trust))  # type: ignore[arg-type]
    with Node(settings) as node:
        yield node


def test_cards_are_pushed_by_name_and_all(cli: Cli, own_id: str, make_home: Callable[[str], Path]) -> None:
    with taking(make_home("taker"), push_from=(own_id,)) as node:
        done = cli("skills", "push", node.record.address, "poet", "--json").json
        assert done["peer"]["node_id"] == node.record.node_id
        assert [(card["label"], card["error"], card["bytes_moved"] > 0) for card in done["cards"]] == [
            ("poet@1", None, True)
        ]
        assert [entry.name for entry in node.registry.list()] == ["poet"]
        text = cli("skills", "push", node.record.address, "--all").out
        assert ("was there" in text, "pushed" in text) == (True, True)
        assert [entry.name for entry in node.registry.list()] == ["poet", "smith"]


def test_a_node_that_only_fetches_says_what_to_do(cli: Cli, own_id: str, make_home: Callable[[str], Path]) -> None:
    with taking(make_home("taker")) as node:
        done = cli("skills", "push", node.record.address, "--all")
        assert node.registry.list() == []
    assert done.code == 1
    assert "trust.push_from" in done.err
    assert "skills sync" in done.err


def test_a_known_peer_is_named_by_name_or_id_and_must_be_that_node(
    cli: Cli, own_id: str, home: Path, make_home: Callable[[str], Path]
) -> None:
    with taking(make_home("taker"), push_from=("approved",), unknown_publishers="quarantine") as node:
        PeerBook(node.registry.database).approve(own_id)
        with Registry.open(home) as registry:
            book = PeerBook(registry.database)
            book.approve(node.record.node_id, name="anna", address=node.record.address)
            book.approve("ab" * 16, name="eve", address=node.record.address)
            book.approve("cd" * 16, name="lost")
        for name, card in (("anna", "poet"), (node.record.node_id, "smith")):
            assert cli("skills", "push", name, card, "--json").json["ok"]
        assert [entry.name for entry in node.registry.list()] == ["poet", "smith"]
        refused = cli("skills", "push", "eve", "poet")
        assert (refused.code, "expected node abab" in refused.err) == (1, True)
    for name, reason in (("lost", "without an address"), ("nobody", "no such peer")):
        assert reason in cli("skills", "push", name, "poet").err


def test_what_waits_in_quarantine_there_is_told(cli: Cli, own_id: str, make_home: Callable[[str], Path]) -> None:
    with taking(make_home("taker"), push_from=(own_id,), unknown_publishers="quarantine") as node:
        done = cli("skills", "push", node.record.address, "poet")
        assert (done.code, "in quarantine there" in done.out) == (0, True)
        assert node.registry.list() == []
        assert [entry.name for entry in node.registry.list(quarantined=True)] == ["poet"]


def test_a_damaged_card_stops_no_other(cli: Cli, own_id: str, home: Path, make_home: Callable[[str], Path]) -> None:
    with Registry.open(home) as registry:
        registry.path_of(registry.entry("poet").digest).unlink()
    with taking(make_home("taker"), push_from=(own_id,)) as node:
        done = cli("skills", "push", node.record.address, "--all", "--json")
        assert [entry.name for entry in node.registry.list()] == ["smith"]
    assert done.code == 1
    assert [card["error"] is None for card in json.loads(done.out)["cards"]] == [False, True]


@pytest.mark.parametrize("arguments", [[], ["poet", "--all"]])
def test_cards_are_named_or_all_are_meant(cli: Cli, own_id: str, arguments: list[str]) -> None:
    assert cli("skills", "push", "127.0.0.1:1", *arguments).code == 2


def test_a_wrong_name_in_the_setting_is_an_error() -> None:
    with pytest.raises(ValueError, match="push_from"):
        TrustSettings(push_from=("anna",))
