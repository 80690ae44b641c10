"""What the owner sees and does of cards in quarantine, and of damaged ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from arrowmoe.node import Node
from arrowmoe.settings import Settings
from registry.identity import Identity
from registry.store import Origin, Registry
from tests.arrowmoe.cli.conftest import Cli
from tests.registry.cards import small_card

PEER = Origin(peer_id="0" * 32, address="192.0.2.1:8815")
WHY = "its publisher is not known here"


@pytest.fixture
def held(home: Path) -> str:
    """The digest of a stranger's card in quarantine."""
    with Registry.open(home) as registry:
        card = small_card("poet").signed(Identity.generate())
        return registry.admit(card, origin=PEER, quarantine_for=WHY).digest


def test_a_card_in_quarantine_is_marked_and_says_why(cli: Cli, held: str) -> None:
    assert [one["quarantined"] for one in cli("skills", "ls", "--json").json] == [WHY]
    assert "poet@1 (quarantine)" in cli("skills", "ls").out
    assert WHY in cli("skills", "show", "poet").out
    assert cli("skills", "show", held, "--json").json["path"] is None
    assert cli("skills", "search", "poet", "--json").json == []


def test_it_is_of_no_use_until_it_is_admitted(cli: Cli, held: str, tmp_path: Path) -> None:
    refused = cli("skills", "export", "poet", tmp_path / "out")
    assert refused.code == 1
    assert f"arrowmoe skills admit {held}" in refused.err
    assert cli("skills", "admit", "poet", "--json").json["quarantined"] is None
    assert cli("skills", "export", "poet", tmp_path / "out").code == 0
    again = cli("skills", "admit", "poet")
    assert (again.code, "was not in quarantine" in again.out) == (0, True)
    assert cli("skills", "admit", "nobody").code == 1


def test_it_can_be_removed(cli: Cli, held: str) -> None:
    assert cli("skills", "rm", "poet", "--yes", "--json").json["digest"] == held
    assert cli("skills", "ls", "--json").json == []


# Healing ------------------------------------------------------------------------------------------------------------


def damage(home: Path) -> None:
    [path] = (home / "cards").rglob("*.arrow")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)


@pytest.fixture
def giver(home: Path, make_home: Callable[[str], Path]) -> Path:
    """The home of another node, which has the one card that is here."""
    card = small_card("origami").signed(Identity.generate())
    theirs = make_home("giver")
    for place in (home, theirs):
        with Registry.open(place) as registry:
            registry.admit(card, origin=PEER)
    return theirs


@pytest.mark.parametrize("node_runs", [False, True])
def test_verify_heals_from_a_peer(cli: Cli, home: Path, giver: Path, node_runs: bool) -> None:
    damage(home)
    with Node(Settings(home=giver, name="giver", discovery=False)) as other:
        address = other.record.address
        mine = Settings(home=home, discovery=False, peers=(address,), scrub_mib_per_s=0)
        if node_runs:
            with Node(mine):
                healed = cli("skills", "verify", "--heal", "--json").json
        else:
            (home / "config.toml").write_text(f'peers = ["{address}"]\n')
            healed = cli("skills", "verify", "--heal", "--json").json
    assert [(one["ok"], one["not_healed"]) for one in healed] == [(True, None)]
    assert healed[0]["reason"]
    assert [one["ok"] for one in cli("skills", "verify", "--json").json] == [True]


def test_what_nobody_has_is_told_and_stays(cli: Cli, home: Path, giver: Path) -> None:
    damage(home)
    done = cli("skills", "verify", "--heal", "--json")
    assert done.code == 1
    [one] = json.loads(done.out)
    assert (one["ok"], "no peer gives card" in one["not_healed"]) == (False, True)
    assert "not healed" in cli("skills", "verify", "--heal").out


def test_a_node_heals_by_itself(home: Path, giver: Path) -> None:
    damage(home)
    with (
        Node(Settings(home=giver, name="giver", discovery=False)) as other,
        Node(Settings(home=home, discovery=False, peers=(other.record.address,))) as node,
    ):
        scrubbed = home / "scrub.json"
        for _ in range(200):
            if scrubbed.exists():
                break
            node._stopping.wait(0.1)
        assert [report.ok for report in node.registry.verify()] == [True]
