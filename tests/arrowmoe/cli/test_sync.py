"""`skills sync`: what its options choose, with a running node and without, and what it says of cards that must wait."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from arrowmoe.node import Node
from arrowmoe.settings import Settings, TrustSettings
from registry.identity import Identity
from registry.inventories import Inventories
from registry.store import Registry
from tests.arrowmoe.cli.conftest import Cli
from tests.registry.cards import small_card

STRANGER = Identity.generate()
CARDS = {
    "poet": small_card("poet", domains=["rhyme/short"], base_name="tiny"),
    "dates": small_card("dates", domains=["dates"], base_name="other", seed=1).signed(STRANGER),
    "large": small_card("large", modules={"m": (4096, 512)}, rank=64, base_name="tiny", seed=2),
}


@pytest.fixture
def giver(make_home: Callable[[str], Path]) -> Iterator[Node]:
    with Node(Settings(home=make_home("giver"), name="giver", discovery=False)) as giver:
        for card in CARDS.values():
            giver.registry.publish(card)
        yield giver


@pytest.fixture(params=["a node runs", "none runs"])
def mine(request: pytest.FixtureRequest, home: Path) -> Iterator[None]:
    """The home's own node, or none."""
    with ExitStack() as stack:
        if request.param == "a node runs":
            stack.enter_context(Node(Settings(home=home, name="mine", discovery=False)))
        yield


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], {"poet", "dates", "large"}),
        (["--name", "p*"], {"poet"}),
        (["--name", "p*", "--name", "dates@1"], {"poet", "dates"}),
        (["--base", "tiny"], {"poet", "large"}),
        (["--publisher", STRANGER.id], {"dates"}),
        (["--domain", "rhyme/*", "--domain", "dates"], {"poet", "dates"}),
        (["--base", "tiny", "--max-size", "0.5"], {"poet"}),
        (["--name", "nobody"], set()),
    ],
)
def test_the_options_say_which_cards_come(cli: Cli, giver: Node, options: list[str], names: set[str]) -> None:
    peer = ["--peer", giver.record.address]
    dry = cli("skills", "sync", *peer, *options, "--dry-run", "--json").json
    assert {card["name"] for card in dry["peers"][0]["missing"]} == names
    report = cli("skills", "sync", *peer, *options, "--json").json
    assert {card["name"] for card in report["peers"][0]["fetched"]} == names
    assert {card["name"] for card in cli("skills", "ls", "--json").json} == names


@pytest.mark.usefixtures("mine")
def test_what_is_no_node_id_is_said(cli: Cli, giver: Node) -> None:
    done = cli("skills", "sync", "--peer", giver.record.address, "--publisher", "anna")
    assert (done.code, "expected a node id of 32 hex digits" in done.err) == (1, True)


@pytest.fixture(params=["a node runs", "none runs"])
def wary(request: pytest.FixtureRequest, home: Path) -> Iterator[None]:
    """The home's owner quarantines what strangers publish; its own node, or none."""
    (home / "config.toml").write_text(f'[trust]\nunknown_publishers = "quarantine"\npublishers = ["{STRANGER.id}"]\n')
    trust = TrustSettings(unknown_publishers="quarantine", publishers=(STRANGER.id,))
    with ExitStack() as stack:
        if request.param == "a node runs":
            stack.enter_context(Node(Settings(home=home, name="mine", discovery=False, trust=trust)))
        yield


@pytest.mark.usefixtures("wary")
@pytest.mark.parametrize("mode", ["human", "quiet", "json"])
def test_a_card_in_quarantine_is_named_with_what_to_do(cli: Cli, giver: Node, mode: str) -> None:
    ids = {entry.name: entry.digest for entry in giver.registry.list()}
    sync = ["skills", "sync", "--peer", giver.record.address, "--name", "poet", "--name", "dates"]
    done = cli(*sync, *([] if mode == "human" else [f"--{mode}"]))
    assert done.code == 0
    if mode == "json":
        [held] = json.loads(done.out)["quarantined"]
        assert (held["digest"], held["name"], bool(held["reason"])) == (ids["poet"], "poet", True)
        assert (held["hint"], done.err) == (f"arrowmoe skills admit {ids['poet']}", "")
        ref = held["hint"].split()[-1]
    else:
        assert "poet@1" in done.err
        assert "is in quarantine: " in done.err
        assert "dates@1" not in done.err
        ref = done.err.partition("arrowmoe skills admit ")[2].partition("`")[0]
    if mode == "quiet":
        assert done.out == f"{ids['dates']}\n", "what can be used"
    assert cli("skills", "admit", ref, "--json").json["digest"] == ids["poet"]


def test_a_node_that_is_forgotten_leaves_no_inventory(cli: Cli, home: Path, giver: Node) -> None:
    node_id = giver.record.node_id
    cli("peers", "approve", node_id)
    assert cli("skills", "sync", "--peer", giver.record.address, "--dry-run").code == 0
    with Registry.open(home) as registry:
        assert Inventories(registry.database).count(node_id) == 3
    assert cli("peers", "rm", node_id).code == 0
    with Registry.open(home) as registry:
        assert Inventories(registry.database).count(node_id) == 0
